"""Memory that is shared: what is given back is zero, and nothing else is touched."""

from __future__ import annotations

import mmap

from syncline.shm import SharedMemory


def test_whole_pages_in_between_are_given_back_and_the_rest_stays() -> None:
    memory, page = SharedMemory(), mmap.PAGESIZE
    memory.grow(4 * page)
    view = memory.view()
    view[:] = b"x" * (4 * page)
    memory.discard(10, 3 * page + 10)
    assert bytes(view[:page]) == b"x" * page and bytes(view[3 * page :]) == b"x" * page
    assert not any(view[page : 3 * page])
    view[page] = 7
    assert memory.view()[page] == 7
    memory.discard(10, 20)  # no whole page
    memory.close()
