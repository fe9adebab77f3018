"""Settings beside each other: errors name the setting, the value and a hint; warnings are one line each."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import pytest

from syncline.errors import ConfigError
from syncline.spec.guardrails import check_combinations, max_stable_agents, model_warnings
from syncline.spec.run_spec import RunSpec, parse
from syncline.transform.codecs import RAW, Need, Raw

ELASTIC = {"kind": "elastic", "alpha": 0.1}


def spec(**settings: Any) -> RunSpec:
    return parse(RunSpec, {"task": "syncline.tasks.digits:Digits", "agents": {"min": 4}, **settings})


def free(**settings: Any) -> dict[str, Any]:
    return {"kind": "async", **settings}


# -- what is refused: exactly with these words -------------------------------------------------------------------------
REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"sync": {"quorum": 5}},
        "sync.quorum: 5 is above the number of agents the run starts with (agents.min = 4). Use at most 4, or leave it out, "
        "or raise agents.min",
    ),
    (
        {"sync": free(quorum=5, buffer=9)},
        "sync.quorum: 5 is above the number of agents the run starts with (agents.min = 4). Use at most 4, or leave it out, "
        "or raise agents.min",
    ),
    (
        {"partition": {"kind": "iid", "parts": 3}},
        "partition.parts: 3 parts are too few for agents.min = 4. Every agent needs a part of its own: raise it or leave it "
        "out",
    ),
    (
        {"sync": free(), "mix": {"alpha": 0.5}},
        "mix.alpha: 0.5 has no meaning in an asynchronous run, where an update is the progress of one period. Use `mix: "
        "{kind: elastic, alpha: …}` to keep agents apart, or leave alpha at 1",
    ),
    (
        {"sync": free(max_ahead=0, buffer=2)},
        "sync.buffer: 2 beside max_ahead: 0, which waits for one update of every live agent. Leave buffer out, or raise "
        "max_ahead",
    ),
    (
        {"sync": free(quorum=3, buffer=2)},
        "sync.quorum: 3 is never reached by a buffer of 2. Use at most 2, or raise sync.buffer, or leave the quorum out",
    ),
    (
        {"sync": free(quorum=3)},
        "sync.quorum: 3 is never reached by a buffer of 2. Use at most 2, or raise sync.buffer, or leave the quorum out",
    ),
    (
        {"sync": free(), "outer": {"kind": "nesterov"}},
        "outer.kind: 'nesterov' in an asynchronous run applies the momentum once for every small merge, which diverges. Use "
        "`outer: {kind: delayed_nesterov, every: 2}` (arXiv:2401.09135), or sgd",
    ),
    (
        {"sync": free(buffer=4), "agents": {"min": 8}, "outer": {"kind": "nesterov"}},
        "outer.kind: 'nesterov' in an asynchronous run applies the momentum once for every small merge, which diverges. Use "
        "`outer: {kind: delayed_nesterov, every: 2}` (arXiv:2401.09135), or sgd",
    ),
    (
        {"sync": free(buffer="all"), "agents": {"min": 8}, "outer": {"kind": "nesterov"}},
        "outer.kind: 'nesterov' in an asynchronous run applies the momentum once for every small merge, which diverges. Use "
        "`outer: {kind: delayed_nesterov, every: 1}` (arXiv:2401.09135), or sgd",
    ),
    (
        {"mix": {"kind": "elastic", "alpha": 0.3}, "agents": {"min": 2, "max": 10}},
        "mix.alpha: elastic averaging of 10 agents is not stable at 0.3: it has to stay below 0.182. The usual value is 0.9 / "
        "N = 0.09, the fastest 2 / (N + 2) = 0.167",
    ),
    (
        {"mix": {"kind": "elastic", "alpha": 0.45}, "sync": free(buffer=1)},
        "mix.alpha: elastic averaging of 4 agents is not stable at 0.45: it has to stay below 0.4. The usual value is 0.9 / N "
        "= 0.225, the fastest 2 / (N + 2) = 0.333",
    ),
    (
        {"mix": {"kind": "elastic", "alpha": 0.4}},
        "mix.alpha: elastic averaging of 4 agents is not stable at 0.4: it has to stay below 0.4. The usual value is 0.9 / N "
        "= 0.225, the fastest 2 / (N + 2) = 0.333",
    ),
    (
        {"mix": {"kind": "elastic"}, "agents": {"min": 1}},
        "mix.alpha: elastic averaging of 1 agent is not stable at 1.0: it has to stay below 1. The usual value is 0.9 / N = "
        "0.9, the fastest 2 / (N + 2) = 0.667",
    ),
    (
        {"mix": {"kind": "elastic"}, "sync": free()},
        "mix.alpha: elastic averaging of 4 agents is not stable at 1.0: it has to stay below 0.4. The usual value is 0.9 / N = "
        "0.225, the fastest 2 / (N + 2) = 0.333",
    ),
    (
        {"mix": {"kind": "elastic", "alpha": 0}},
        "mix.alpha: 0 beside `mix: {kind: elastic}`: the center would never move. The usual value is 0.9 / N = 0.225, the "
        "fastest 2 / (N + 2) = 0.333",
    ),
    (
        {"mix": ELASTIC, "outer": {"kind": "momentum"}},
        "outer: 'momentum' beside `mix: {kind: elastic}`: what an agent gives up, the center has to take up whole. Leave outer "
        "at 'sgd', or use `mix: {kind: interpolate}`",
    ),
    (
        {"mix": ELASTIC, "outer": {"lr": 0.5}},
        "outer.lr: 0.5 beside `mix: {kind: elastic}`: what an agent gives up, the center has to take up whole. Leave outer.lr "
        "at 1.0, or use `mix: {kind: interpolate}`",
    ),
    (
        {"mix": ELASTIC, "merge": {"weights": "samples"}},
        "merge.weights: 'samples' beside `mix: {kind: elastic}`: what an agent gives up, the center has to take up whole. "
        "Leave merge.weights at 'uniform', or use `mix: {kind: interpolate}`",
    ),
    (
        {"mix": ELASTIC, "sync": free(staleness={"kind": "polynomial"})},
        "sync.staleness: 'polynomial' beside `mix: {kind: elastic}`: what an agent gives up, the center has to take up whole. "
        "Leave sync.staleness out, and bound the lag with sync.max_lag",
    ),
    (
        {"mix": {"alpha": 0.5}, "merge": {"normalize": "fednova"}},
        "merge.normalize: fednova divides what a period has changed by its steps, and with mix = interpolate 0.5 an update "
        "holds more than that. Leave mix.alpha at 1, or leave merge.normalize out",
    ),
    (
        {"mix": ELASTIC, "merge": {"normalize": "fednova"}},
        "merge.normalize: fednova divides what a period has changed by its steps, and with mix = elastic 0.1 an update holds "
        "more than that. Leave mix.alpha at 1, or leave merge.normalize out",
    ),
    (
        {"local": {"control_variates": {"option": 2}}, "merge": {"weights": "samples"}},
        "merge.weights: 'samples' beside local.control_variates: scaffold: the center's c is the plain mean of all c_i. Leave "
        "merge.weights at 'uniform', or leave local.control_variates out",
    ),
    (
        {"local": {"control_variates": {"option": 2}}, "mix": ELASTIC},
        "mix.kind: 'elastic' beside local.control_variates: scaffold: an elastic update is no work of a period. Leave mix.kind "
        "at 'interpolate', or leave local.control_variates out",
    ),
    (
        {"local": {"control_variates": {"option": 1}}, "mix": {"alpha": 0.5}},
        "mix.alpha: 0.5 beside local.control_variates: scaffold: option 1 takes the gradient at the center, where the period "
        "begins. Leave mix.alpha at 1.0, or leave local.control_variates out",
    ),
]


@pytest.mark.parametrize(("settings", "words"), REFUSED, ids=[words.partition(". ")[0][:60] for _, words in REFUSED])
def test_what_is_refused_names_the_setting_the_value_and_the_mend(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        spec(**settings)
    assert str(error.value) == words
    assert error.value.setting and error.value.problem and error.value.hint


# -- what is not -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sync": free()},
        {"sync": free(buffer="all")},
        {"sync": free(max_ahead=0)},
        {"sync": free(max_ahead=0, buffer="all")},
        {"sync": free(max_ahead=0, quorum=4)},
        {"sync": free(buffer=2, quorum=2)},
        {"sync": free(), "outer": {"kind": "delayed_nesterov", "every": 2}},
        {"merge": {"normalize": "fednova"}, "local": {"optimizer": {"kind": "SGD", "lr": 0.1, "momentum": 0}}},
        {"sync": free(), "mix": {"kind": "elastic", "alpha": 0.2}},
        {"sync": free(staleness={"kind": "constant"}), "mix": ELASTIC},
        {"mix": ELASTIC},
        {"merge": {"normalize": "fednova"}},
        {"outer": {"kind": "nesterov"}},
    ],
    ids=str,
)
def test_what_is_meant_is_neither_refused_nor_doubted(settings: dict[str, Any]) -> None:
    assert spec(**settings).warnings == []


# -- what is doubted ---------------------------------------------------------------------------------------------------
DOUBTED: list[tuple[dict[str, Any], str]] = [
    ({"mix": {"alpha": 1.5}}, "mix.alpha: 1.5 over-relaxes: agents jump past the center. Up to 1 is monotone"),
    (
        {"mix": {"alpha": 0}},
        "mix.alpha: 0 trains every agent alone; the center is only watched. Use more than 0 to share",
    ),
    (
        {"mix": {"kind": "elastic", "alpha": 0.3}},
        "mix.alpha: 0.3 makes the center jump past the mean of 4 agents (N alpha = 1.2). The usual value is 0.9 / N = 0.225",
    ),
    (
        {"local": {"seconds": 3}},
        "merge.weights: uniform with local.seconds lets agents that make more steps pull the center to their own data. Use "
        "merge.normalize: fednova to count all data alike, or merge.weights: steps to count the work done",
    ),
    (
        {"sync": free(buffer=9)},
        "sync.buffer: 9 updates are more than 4 agents can have under way (8): every merge will close early, with less. Use at "
        "most 8, or raise agents.min",
    ),
    (
        {"sync": free(buffer=5, overlap=False)},
        "sync.buffer: 5 updates are more than 4 agents can have under way (4): every merge will close early, with less. Use at "
        "most 4, or raise agents.min",
    ),
    (
        {"sync": free(buffer=1, max_lag=2)},
        "sync.max_lag: 2 is below the mean lag of 4 equal agents, (N − 1) / K = 3.0: much of the work will be dropped. Raise "
        "it or the buffer",
    ),
    (
        {"sync": free(), "outer": {"kind": "momentum"}},
        "outer.kind: momentum is applied once for every small merge, so it acts K times as strongly as in rounds. "
        "`delayed_nesterov` was made for asynchronous runs",
    ),
    (
        {"sync": free(buffer=4), "agents": {"min": 8}, "outer": {"kind": "delayed_nesterov", "every": 8}},
        "outer.every: 8 merges between two steps of the momentum, each of which moves the center by 1 / 8 of an update. With 8 "
        "agents and a buffer of 4 that should be N / K = 2",
    ),
    (
        {"sync": free(buffer=2), "agents": {"min": 8}, "outer": {"kind": "delayed_nesterov", "every": 1}},
        "outer.every: 1 merges between two steps of the momentum, each of which moves the center by 1 / 1 of an update. With 8 "
        "agents and a buffer of 2 that should be N / K = 4",
    ),
    (
        {"sync": free(buffer=1), "merge": {"weights": "samples"}},
        "merge.weights: samples has no effect with sync.buffer: 1, because a merge of one update has no other to weigh it "
        "against. Raise sync.buffer, or leave merge.weights out",
    ),
    (
        {"sync": free(buffer=1), "merge": {"normalize": "fednova"}},
        "merge.normalize: fednova has no effect with sync.buffer: 1, because a merge of one update has no other to weigh it "
        "against. Raise sync.buffer, or leave merge.normalize out",
    ),
    (
        {
            "merge": {"normalize": "fednova"},
            "local": {"optimizer": {"kind": "sgd", "lr": 0.1, "momentum": 0.9}, "prox_mu": 0.1},
        },
        "merge.normalize: fednova divides an update by its number of steps, which is the paper's factor for plain SGD alone. "
        "With local.optimizer.momentum: 0.9 and local.prox_mu: 0.1 it is an approximation: agents with many steps count a "
        "little too much or too little. Use plain SGD inside and momentum outside (outer.kind: momentum), or merge.weights: "
        "steps",
    ),
    (
        {
            "merge": {"normalize": "fednova"},
            "local": {"optimizer": {"kind": "adam"}, "schedule": {"kind": "cosine", "T_max": 9}},
        },
        "merge.normalize: fednova divides an update by its number of steps, which is the paper's factor for plain SGD alone. "
        "With local.optimizer.kind: adam and local.schedule it is an approximation: agents with many steps count a little too "
        "much or too little. Use plain SGD inside and momentum outside (outer.kind: momentum), or merge.weights: steps",
    ),
]


@pytest.mark.parametrize(("settings", "words"), DOUBTED, ids=[words[:40] for _, words in DOUBTED])
def test_what_is_rarely_meant_is_doubted_in_plain_words(settings: dict[str, Any], words: str) -> None:
    assert spec(**settings).warnings == [words]


@pytest.mark.parametrize(
    ("partition", "rule", "doubted"),
    [
        ({"kind": "shards", "per_agent": 2}, {"rule": "median"}, True),
        ({"kind": "dirichlet", "alpha": 0.1}, {"rule": "krum"}, True),
        ({"kind": "dirichlet", "alpha": 0.1}, {"rule": "norm_clip", "max_norm": 1.0}, False),
        ({"kind": "dirichlet", "alpha": 0.5}, {"rule": "median"}, False),
        ({"kind": "shards", "per_agent": 3}, {"rule": "median"}, False),
        ({"kind": "iid"}, {"rule": "median"}, False),
    ],
)
def test_a_robust_rule_is_doubted_where_honest_agents_look_bad(
    partition: dict[str, Any], rule: dict[str, Any], doubted: bool
) -> None:
    found = spec(agents={"min": 7}, partition=partition, merge=rule).warnings
    assert [f"merge.rule: {rule['rule']} takes agents" in doubt for doubt in found] == [True] * doubted


def test_a_long_lag_is_told_with_how_much_smaller_a_stable_learning_rate_is() -> None:
    """x_{t+1} = x_t − η h x_{t−τ} converges iff η h < 2 sin(π / (2 (2 τ + 1))): for τ = 0 twice as far as π / (2 τ + 1)."""
    (found,) = spec(agents={"min": 9}, sync=free(buffer=2)).warnings
    assert found.startswith("sync.buffer: the mean lag of 9 equal agents is (N − 1) / K = 4.0 versions.")
    assert f"may be {round(2 / (2 * math.sin(math.pi / (2 * 9))))} times too large" in found
    assert spec(agents={"min": 9}, sync=free(buffer=3)).warnings == []


def test_averaged_statistics_of_batchnorm_are_doubted() -> None:
    (found,) = model_warnings(["0.weight", "1.running_mean", "1.running_var"])
    assert "1.running_mean and 1 more" in found and "Use GroupNorm" in found
    assert "local" not in found, "statistics that stay with the agents would make the center's metrics meaningless"
    assert model_warnings(["0.weight", "0.bias"], ["1.num_batches_tracked"]) == []


def test_statistics_of_batchnorm_that_stay_at_home_make_the_centers_metrics_doubtful() -> None:
    (found,) = model_warnings(["0.weight"], ["1.running_mean", "1.running_var", "1.num_batches_tracked"])
    assert "1.running_mean and 1 more" in found and "its metrics mean little" in found


def test_one_agent_alone_is_not_doubted() -> None:
    alone = {"agents": {"min": 1}}
    assert spec(**alone, mix={"alpha": 0}).warnings == []
    assert spec(**alone, mix={"kind": "elastic", "alpha": 0.9}).warnings == []
    assert spec(**alone, sync=free(max_lag=0, buffer=1)).warnings == []
    assert spec(**alone, local={"seconds": 3}).warnings == []
    assert len(spec(agents={"min": 1, "max": 2}, local={"seconds": 3}).warnings) == 1


@pytest.mark.parametrize(("alpha", "most"), [(0.9, 1), (0.45, 3), (0.4, 3), (0.39, 4), (2 / 11, 9), (0.09, 21)])
def test_an_elastic_alpha_is_stable_for_so_many_agents(alpha: float, most: int) -> None:
    assert max_stable_agents(alpha) == most
    assert alpha < 2 / (most + 1) and alpha >= 2 / (most + 2)


def test_several_doubts_are_all_told() -> None:
    found = spec(sync=free(buffer=9, max_lag=0), outer={"kind": "momentum"}).warnings
    assert [doubt.partition(":")[0] for doubt in found] == ["sync.buffer", "sync.max_lag", "outer.kind"]


# -- defaults that follow from the number of agents --------------------------------------------------------------------
@pytest.mark.parametrize(
    ("agents", "sync", "updates", "lag"),
    [
        (1, {}, 2, 16),
        (4, {}, 2, 16),
        (9, {}, 5, 16),
        (100, {}, 10, 99),
        (4, {"buffer": 1}, 1, 30),
        (8, {"buffer": 4}, 4, 17),
        (50, {"buffer": "all"}, None, 16),
        (4, {"max_ahead": 0}, None, 16),
        (4, {"max_lag": 0, "buffer": 3}, 3, 0),
    ],
)
def test_the_buffer_and_the_bound_on_lags_follow_from_the_number_of_agents(
    agents: int, sync: dict[str, Any], updates: int | None, lag: int
) -> None:
    """K: half of the agents, 2 to 10. The bound: room for one five times slower, 2 r (N − 1) / K, at least 16."""
    made = spec(agents={"min": agents}, sync=free(**sync)).sync
    assert made.kind == "async" and made.buffer_size(agents) == updates and made.lag_bound(agents) == lag


# -- codecs ------------------------------------------------------------------------------------------------------------
class Needy(Raw):
    kind: Literal["raw"] = "raw"
    needs: ClassVar[frozenset[Need]] = frozenset()


def with_codec(needs: set[Need], **settings: Any) -> RunSpec:
    """A run whose codec needs this; the codec was not checked yet."""
    codec = type("Needing", (Needy,), {"__module__": __name__, "needs": frozenset(needs)})()
    run = spec(**settings)
    return run.model_copy(update={"wire": run.wire.model_copy(update={"codec": codec})})


@pytest.mark.parametrize(
    ("needs", "settings", "problem"),
    [
        ({Need.COMMON_SCALE}, {}, "'raw' works only where all agents of a merge share one scale"),
        ({Need.AGENT_MEMORY}, {"sync": {"sample": 0.1}}, "which is not so in this run (sync.sample = 0.1)"),
    ],
)
def test_a_codec_that_needs_what_the_run_does_not_provide_is_refused(
    needs: set[Need], settings: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError) as error:
        check_combinations(with_codec(needs, **settings))
    assert error.value.setting == "wire.codec" and problem in error.value.problem and error.value.hint


def test_a_codec_that_has_what_it_needs_is_accepted() -> None:
    check_combinations(with_codec({Need.PLAIN_UPDATES, Need.AGENT_MEMORY}))


def test_a_codec_is_named_alone_or_with_its_settings() -> None:
    named, full = (spec(wire={"codec": codec}) for codec in ("raw", {"kind": "raw"}))
    assert named == full == spec() and named.wire.codec == RAW
    with pytest.raises(ConfigError) as error:
        spec(wire={"codec": "int9"})
    assert error.value.setting == "wire.codec.kind" and "raw" in str(error.value)
