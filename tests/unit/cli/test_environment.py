"""FleetSupervisor are configured by flags and by the environment alike; a flag beats the environment."""

from __future__ import annotations

from typing import Any

import pytest

from syncline_cli import main as cli

AGENT = {
    "SYNCLINE_NATS_URL": ("connect", "nats://hub:4222"),
    "SYNCLINE_NAME": ("name", "edge-7"),
    "SYNCLINE_KEY": ("key", "/keys/edge-7.nk"),
    "SYNCLINE_TLS_CA": ("tls_ca", "/keys/ca.crt"),
    "SYNCLINE_TLS_CERT": ("tls_cert", "/keys/edge-7.crt"),
    "SYNCLINE_TLS_KEY": ("tls_key", "/keys/edge-7.key"),
    "SYNCLINE_STATE_DIR": ("state_dir", "/state"),
    "SYNCLINE_DEVICE": ("device", "cuda:1"),
    "SYNCLINE_THREADS": ("threads", 3),
    "SYNCLINE_ALLOW_TASK": ("allow_task", ("syncline.tasks.*", "mine.py:*", "other:*")),
    "SYNCLINE_TASK_DIR": ("task_dir", "/usr"),  # any that is there
    "SYNCLINE_LOG_FILE": ("log_file", "/log"),
    "SYNCLINE_PATIENCE": ("patience_s", 7.5),
}
COORDINATOR = {
    **{name: AGENT[name] for name in AGENT if name not in ("SYNCLINE_NAME", "SYNCLINE_STATE_DIR", "SYNCLINE_DEVICE")},
    "SYNCLINE_BROKER_LOG": ("broker_log", "/broker.log"),
    "SYNCLINE_KEYS": ("keys", "/keys"),
}


def spelled(value: Any) -> str:
    return "mine.py:* other:*" if isinstance(value, tuple) else str(value)


def options_of(service: str, args: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the service is started with."""
    seen: list[Any] = []

    def run(options: Any) -> int:
        seen.append(options)
        return 0

    monkeypatch.setattr(f"syncline_{service}.app.run", run)
    assert cli.main([service, *args]) == 0
    return seen[0]


@pytest.mark.parametrize(("service", "settings"), [("agent", AGENT), ("coordinator", COORDINATOR)])
def test_the_environment_sets_every_option_and_the_help_says_so(
    service: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for variable, (_, value) in settings.items():
        monkeypatch.setenv(variable, spelled(value))
    options = options_of(service, [], monkeypatch)
    for field, value in settings.values():
        assert getattr(options, field) == value
    cli.main([service, "--help"])
    said = capsys.readouterr().out
    assert all(variable in said for variable in settings)


def test_a_flag_beats_the_environment_and_an_empty_variable_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNCLINE_NAME", "from-environment")
    monkeypatch.setenv("SYNCLINE_DEVICE", "")
    options = options_of("agent", ["--name", "from-flag"], monkeypatch)
    assert (options.name, options.device) == ("from-flag", "auto")
