"""Checks of settings beside each other: combinations without meaning are refused, rarely intended ones give a warning.

Every error and warning names the setting, its value and a hint. The stability bounds of elastic averaging follow from EASGD
(arXiv:1412.6651) on ½ h x² for a learning rate that goes to 0; the other bounds are from the papers named in `sections`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from syncline.errors import ConfigError
from syncline.spec.sections import RunSettings
from syncline.transform.codecs import Need

FEW_LABELS = 0.3  # α of a Dirichlet split below which most agents have few labels
BATCH_NORM = ("running_mean", "running_var")  # endings of the names of BatchNorm's statistics
LONG_LAG = 4.0  # mean lag from which on the learning rate may have to be lowered, versions


def check_combinations(spec: RunSettings) -> None:
    """Check the settings of a run beside each other.

    Raises:
        ConfigError: a combination has no meaning.
    """
    _check_counts(spec)
    _check_target(spec)
    _check_rule(spec)
    if spec.sync.kind == "async":
        _check_async(spec)
    if spec.mix.kind == "elastic":
        _check_elastic(spec)
    if spec.merge.normalize is not None and (spec.mix.alpha != 1 or spec.mix.kind == "elastic"):
        raise ConfigError(
            "merge.normalize",
            f"fednova divides what a period has changed by its steps, and with mix = {spec.mix.kind} {spec.mix.alpha} an "
            "update holds more than that",
            "Leave mix.alpha at 1, or leave merge.normalize out",
        )
    if spec.local.control_variates is not None:
        _check_scaffold(spec)
    _check_codec(spec)


def _check_codec(spec: RunSettings) -> None:
    """Refuse a codec that needs something that the run does not provide."""
    codec, sample = spec.wire.codec, spec.sync.sample if spec.sync.kind == "rounds" else None
    provided = {Need.PLAIN_UPDATES}
    if sample is None:
        provided.add(Need.AGENT_MEMORY)
    for need in Need:  # in a fixed order, so that the same spec has the same error
        if need in codec.needs and need not in provided:
            because = f" (sync.sample = {sample:g})" if need == Need.AGENT_MEMORY else ""
            raise ConfigError(
                "wire.codec",
                f"{codec.kind!r} works only where {need.value}, which is not so in this run{because}",
                "Use a codec that does not need it, such as raw",
            )


def _check_counts(spec: RunSettings) -> None:
    least = spec.agents.min
    if isinstance(spec.sync.quorum, int) and spec.sync.quorum > least:
        raise ConfigError(
            "sync.quorum",
            f"{spec.sync.quorum} is above the number of agents the run starts with (agents.min = {least})",
            f"Use at most {least}, or leave it out, or raise agents.min",
        )
    if spec.partition.parts is not None and spec.partition.parts < least:
        raise ConfigError(
            "partition.parts",
            f"{spec.partition.parts} parts are too few for agents.min = {least}",
            "Every agent needs a part of its own: raise it or leave it out",
        )


def _check_target(spec: RunSettings) -> None:
    target = spec.stop.target
    if target is not None and not spec.evaluate.center:
        raise ConfigError(
            "stop.target",
            f"{target.metric!r} is a metric of the center, which is not evaluated with evaluate.center = false",
            "Leave evaluate.center at true, or leave stop.target out",
        )


def _check_rule(spec: RunSettings) -> None:
    """Check that every merge has the updates that the rule needs, as far as this can be known before the run."""
    rule, sync, least = spec.merge, spec.sync, spec.merge.min_updates()
    if rule.weights != "uniform" and not rule.weighted:
        raise ConfigError(
            "merge.weights",
            f"{rule.weights!r} beside merge.rule = {rule.rule}, which takes all updates as equals: an agent must not gain "
            "weight by what it says of itself",
            "Leave merge.weights out, or use mean, norm_clip or geometric_median, which have weights",
        )
    buffer = sync.buffer_size(spec.agents.min) if sync.kind == "async" else None
    for setting, count in (("agents.min", spec.agents.min), ("sync.quorum", sync.quorum), ("sync.buffer", buffer)):
        if isinstance(count, int) and count < least:
            raise ConfigError(
                setting,
                f"{count} is too few for merge.rule = {rule.rule}, which needs {least} updates in every merge",
                f"Use at least {least}, or {rule.hint_for_fewer()}",
            )
    if sync.kind == "async" and sync.max_ahead is not None and buffer is not None and least > 1:
        raise ConfigError(
            "sync.buffer",
            f"{buffer} beside sync.max_ahead = {sync.max_ahead} and merge.rule = {rule.rule}, which needs {least} updates: "
            "fast agents would wait for a slow one, and its update for theirs",
            "Use `buffer: all`, or leave sync.max_ahead out",
        )
    most = max(spec.agents.min, spec.agents.max or 0)
    if rule.max_updates is not None and most > rule.max_updates:
        raise ConfigError(
            "agents.max",
            f"{most} agents are too many for merge.rule = {rule.rule}, which compares every update with every other one",
            f"Use at most {rule.max_updates}, or median or trimmed_mean, which take any number",
        )


def _check_async(spec: RunSettings) -> None:
    sync, mix = spec.sync, spec.mix
    assert sync.kind == "async"
    if mix.kind == "interpolate" and mix.alpha != 1:
        raise ConfigError(
            "mix.alpha",
            f"{mix.alpha} has no meaning in an asynchronous run, where an update is the progress of one period",
            "Use `mix: {kind: elastic, alpha: …}` to keep agents apart, or leave alpha at 1",
        )
    if sync.max_ahead == 0 and isinstance(sync.buffer, int):
        raise ConfigError(
            "sync.buffer",
            f"{sync.buffer} beside max_ahead: 0, which waits for one update of every live agent",
            "Leave buffer out, or raise max_ahead",
        )
    size = sync.buffer_size(spec.agents.min)
    if sync.quorum is not None and size is not None and sync.quorum > size:
        raise ConfigError(
            "sync.quorum",
            f"{sync.quorum} is never reached by a buffer of {size}",
            f"Use at most {size}, or raise sync.buffer, or leave the quorum out",
        )
    if str(spec.outer.kind) == "nesterov":
        raise ConfigError(
            "outer.kind",
            "'nesterov' in an asynchronous run applies the momentum once for every small merge, which diverges",
            f"Use `outer: {{kind: delayed_nesterov, every: {_merges_of_a_round(spec)}}}` (arXiv:2401.09135), or sgd",
        )


def _merges_of_a_round(spec: RunSettings) -> int:
    """Return N / K, the merges of an asynchronous run in which every agent has one update on average; 1 at least."""
    assert spec.sync.kind == "async"
    size = spec.sync.buffer_size(spec.agents.min)
    return 1 if size is None else max(1, round(spec.agents.min / size))


def max_stable_agents(alpha: float) -> int:
    """Return the largest N for which elastic averaging is stable: α < 2 / (N + 1).

    The bound holds if all agents mix with the same center: in rounds, and in asynchronous runs of equally fast agents.
    """
    n = int(2 / alpha) + 1
    while n > 0 and alpha >= 2 / (n + 1):
        n -= 1
    return n


def too_many_agents(spec: RunSettings, agents: int) -> str:
    """Return the reason against so many agents at once, or '' if the run can have them."""
    if spec.mix.kind != "elastic" or agents <= (most := max_stable_agents(spec.mix.alpha)):
        return ""
    return (
        f"mix.alpha = {spec.mix.alpha:g} is stable for {most} agent{'s' * (most > 1)} at most (alpha < 2 / (N + 1)), and so "
        f"many are here. For {agents} agents use an alpha of 0.9 / N = {0.9 / agents:.3g}"
    )


def _check_elastic(spec: RunSettings) -> None:
    n, alpha, sync = max(spec.agents.min, spec.agents.max or 0), spec.mix.alpha, spec.sync
    most = 2 / (n + 1)
    usual = f"0.9 / N = {0.9 / n:.3g}, the fastest 2 / (N + 2) = {2 / (n + 2):.3g}"
    if alpha == 0:
        raise ConfigError(
            "mix.alpha", "0 beside `mix: {kind: elastic}`: the center would never move", f"The usual value is {usual}"
        )
    if alpha >= most:
        raise ConfigError(
            "mix.alpha",
            f"elastic averaging of {n} agent{'s' * (n > 1)} is not stable at {alpha}: it has to stay below {most:.3g}",
            f"The usual value is {usual}",
        )
    for setting, value, needed in (
        ("outer", spec.outer.kind, "sgd"),
        ("outer.lr", spec.outer.lr, 1.0),
        ("merge.rule", str(spec.merge.rule), "mean"),
        ("merge.weights", spec.merge.weights, "uniform"),
    ):
        if value != needed:
            raise ConfigError(
                setting,
                f"{value!r} beside `mix: {{kind: elastic}}`: what an agent gives up, the center has to take up whole",
                f"Leave {setting} at {needed!r}, or use `mix: {{kind: interpolate}}`",
            )
    if sync.kind == "async" and sync.staleness is not None and sync.staleness.kind != "constant":
        raise ConfigError(
            "sync.staleness",
            f"{sync.staleness.kind!r} beside `mix: {{kind: elastic}}`: what an agent gives up, the center has to take up whole",
            "Leave sync.staleness out, and bound the lag with sync.max_lag",
        )


def _check_scaffold(spec: RunSettings) -> None:
    assert spec.local.control_variates is not None
    wrong: dict[str, tuple[object, object, str]] = {
        "merge.rule": (str(spec.merge.rule), "mean", "which c_i the center holds would not be known"),
        "merge.weights": (spec.merge.weights, "uniform", "the center's c is the plain mean of all c_i"),
        "mix.kind": (spec.mix.kind, "interpolate", "an elastic update is no work of a period"),
    }
    if spec.local.control_variates.option == 1:
        wrong["mix.alpha"] = (spec.mix.alpha, 1.0, "option 1 takes the gradient at the center, where the period begins")
    for setting, (value, needed, why) in wrong.items():
        if value != needed:
            raise ConfigError(
                setting,
                f"{value!r} beside local.control_variates: scaffold: {why}",
                f"Leave {setting} at {needed!r}, or leave local.control_variates out",
            )


def warnings_of(spec: RunSettings) -> list[str]:
    """Return warnings about settings that are valid but rarely intended."""
    n, mix, sync = spec.agents.min, spec.mix, spec.sync
    found = []
    if mix.alpha > 1:
        found.append(f"mix.alpha: {mix.alpha} over-relaxes: agents jump past the center. Up to 1 is monotone")
    if mix.alpha == 0 and n > 1:
        found.append("mix.alpha: 0 trains every agent alone; the center is only watched. Use more than 0 to share")
    if mix.kind == "elastic" and n * mix.alpha >= 1 and n > 1:
        found.append(
            f"mix.alpha: {mix.alpha} makes the center jump past the mean of {n} agents (N alpha = {n * mix.alpha:.3g}). "
            f"The usual value is 0.9 / N = {0.9 / n:.3g}"
        )
    several = max(n, spec.agents.max or 0) > 1
    uniform = spec.merge.weights == "uniform" and spec.merge.normalize is None
    if spec.local.seconds is not None and uniform and several:
        found.append(
            "merge.weights: uniform with local.seconds lets agents that make more steps pull the center to their own data. "
            "Use merge.normalize: fednova to count all data alike, or merge.weights: steps to count the work done"
        )
    found += _fednova_warnings(spec)
    if sync.kind == "async":
        found += _async_warnings(spec)
    part, rule = spec.partition, spec.merge.rule
    few = part.per_agent <= 2 if part.kind == "shards" else part.kind == "dirichlet" and part.alpha < FEW_LABELS
    if few and rule not in ("mean", "norm_clip"):
        found.append(
            f"merge.rule: {rule} takes agents with other data for bad ones, and by this partition every agent has a few labels "
            "only. norm_clip bounds what one agent can do, and leaves out nobody"
        )
    return found


def model_warnings(averaged: Iterable[str], local: Iterable[str] = ()) -> list[str]:
    """Return warnings about a model.

    Args:
        averaged: names of the tensors that are sent and averaged.
        local: names of the tensors that stay with the agents.
    """
    if kept := [name for name in local if name.endswith(BATCH_NORM)]:
        return [
            f"task: BatchNorm's statistics stay with the agents ({kept[0]} and {len(kept) - 1} more), so the center is "
            "evaluated and exported with those that model() gave it, and its metrics mean little. Use GroupNorm, or look at "
            "the agents' own metrics: `evaluate: {center: false, agents: true}`"
        ]
    statistics = [name for name in averaged if name.endswith(BATCH_NORM)]
    if not statistics:
        return []
    return [
        f"task: the model has BatchNorm's statistics ({statistics[0]} and {len(statistics) - 1} more). In training each agent "
        "normalises by its own batches, and the center is evaluated with the mean of all agents' statistics: where data "
        "differ, the two do not fit together. Use GroupNorm, which has none"
    ]


def _fednova_warnings(spec: RunSettings) -> list[str]:
    """Return a warning if FedNova's factors are not exact, as they are for plain SGD (arXiv:2007.07481)."""
    local = spec.local
    if spec.merge.normalize is None:
        return []
    momentum = local.optimizer.arguments.get("momentum", 0)
    odd = {
        f"local.optimizer.kind: {local.optimizer.kind}": local.optimizer.kind.lower() != "sgd",
        f"local.optimizer.momentum: {momentum}": bool(momentum),
        f"local.prox_mu: {local.prox_mu:g}": bool(local.prox_mu),
        "local.schedule": local.schedule is not None,
    }
    named = [setting for setting, given in odd.items() if given]
    if not named:
        return []
    return [
        "merge.normalize: fednova divides an update by its number of steps, which is the paper's factor for plain SGD alone. "
        f"With {' and '.join(named)} it is an approximation: agents with many steps count a little too much or too little. "
        "Use plain SGD inside and momentum outside (outer.kind: momentum), or merge.weights: steps"
    ]


def _async_warnings(spec: RunSettings) -> list[str]:
    n, sync = spec.agents.min, spec.sync
    assert sync.kind == "async"
    found = []
    size = sync.buffer_size(n)
    under_way = n * (2 if sync.overlap else 1)
    if size is not None and size > under_way:
        found.append(
            f"sync.buffer: {size} updates are more than {n} agents can have under way ({under_way}): every merge will close "
            f"early, with less. Use at most {under_way}, or raise agents.min"
        )
    mean_lag = (n - 1) / (size or n)
    if sync.max_lag is not None and sync.max_lag < mean_lag:
        found.append(
            f"sync.max_lag: {sync.max_lag} is below the mean lag of {n} equal agents, (N − 1) / K = {mean_lag:.1f}: much of "
            "the work will be dropped. Raise it or the buffer"
        )
    if mean_lag >= LONG_LAG:
        found.append(
            f"sync.buffer: the mean lag of {n} equal agents is (N − 1) / K = {mean_lag:.1f} versions. A learning rate that is "
            f"just stable in rounds may be {2 * (2 * mean_lag + 1) / math.pi:.0f} times too large then. Lower it, or raise the "
            "buffer"
        )
    for setting, given in (
        ("merge.weights", spec.merge.weights != "uniform" and spec.merge.weights),
        ("merge.normalize", spec.merge.normalize),
    ):
        if size == 1 and given:
            found.append(
                f"{setting}: {given} has no effect with sync.buffer: 1, because a merge of one update has no other to weigh it "
                f"against. Raise sync.buffer, or leave {setting} out"
            )
    every, right = getattr(spec.outer, "every", None), _merges_of_a_round(spec)
    if every is not None and not right / 2 < every < 2 * right:
        found.append(
            f"outer.every: {every} merges between two steps of the momentum, each of which moves the center by 1 / {every} of "
            f"an update. With {n} agents and a buffer of {size or n} that should be N / K = {right}"
        )
    if str(spec.outer.kind) == "momentum":
        found.append(
            "outer.kind: momentum is applied once for every small merge, so it acts K times as strongly as in rounds. "
            "`delayed_nesterov` was made for asynchronous runs"
        )
    return found
