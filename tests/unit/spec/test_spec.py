"""Settings: defaults, and for every mistake the setting, its value and the hint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from syncline.averaging.merge import RULES
from syncline.errors import ConfigError
from syncline.spec.run_spec import RunSpec, load_spec, parse
from syncline.spec.sections import Local, Optimizer, Target

TASK = "syncline.tasks.digits:Digits"

EXAMPLE = """
name: digits
task: syncline.tasks.digits:Digits        # or path/to/my_task.py:MyTask
agents: {min: 4}
partition: {kind: dirichlet, alpha: 0.5, seed: 7}
sync: {kind: rounds, quorum: 3, grace_s: 2.0}
local: {steps: 50, batch_size: 32, optimizer: {kind: sgd, lr: 0.1, momentum: 0.9}}
merge: {rule: mean, weights: uniform}
outer: {kind: sgd, lr: 1.0}
mix: {alpha: 1.0}
wire: {window: 8}
stop: {versions: 200, target: {metric: accuracy, at_least: 0.95}}
seed: 7
"""


def spec(**settings: Any) -> RunSpec:
    return parse(RunSpec, {"task": TASK, **settings})


def refused(**settings: Any) -> ConfigError:
    with pytest.raises(ConfigError) as error:
        spec(**settings)
    return error.value


# -- what is accepted --------------------------------------------------------------------------------------------------
def test_everything_but_the_task_has_a_default() -> None:
    made = spec()
    assert (made.name, made.agents.min, made.partition.kind, made.sync.quorum) == ("run", 1, "iid", "all")
    assert (made.merge.rule, made.merge.weights, made.outer.lr, made.mix.alpha) == ("mean", "uniform", 1.0, 1.0)
    assert (made.stop.versions, made.stop.target, made.seed, made.warnings) == (100, None, 0, [])


def test_the_documented_example_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(EXAMPLE)
    made = load_spec(tmp_path / "spec.yaml")
    assert made.partition.kind == "dirichlet" and made.partition.seed == 7
    assert made.sync.quorum == 3 and made.stop.target is not None and made.stop.target.reached(0.95)
    assert made.local.optimizer.arguments == {"lr": 0.1, "momentum": 0.9}


def test_a_spec_survives_its_own_dump() -> None:
    made = spec(
        partition={"kind": "shards", "per_agent": 3}, local={"optimizer": {"kind": "adam", "betas": [0.8, 0.9]}}
    )
    assert parse(RunSpec, made.model_dump(mode="json")) == made


def test_a_spec_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        spec().seed = 3  # type: ignore[misc]


@pytest.mark.parametrize("task", ["a:B", "package.module:Class", "my_task.py:MyTask", "path/to/my_task.py:MyTask"])
def test_a_task_is_a_class_in_a_module_or_a_file(task: str) -> None:
    assert spec(task=task).task == task


# -- what is refused: exactly with these words -------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        # names
        ({"name": "My Run"}, "name: 'My Run' is not a name. Use 1 to 63 of a-z, 0-9 and '-'"),
        ({"name": "fleet"}, "name: 'fleet' is reserved. Choose another than auto, broker, coordinator, dashboard, data, fleet, "
         "watch"),
        ({"task": "digits"}, "task: 'digits' names no class. Write `package.module:Class` or `file.py:Class`"),
        ({"task": "a.b:not-a-name"}, "task: 'a.b:not-a-name' names no class. Write `package.module:Class` or `file.py:Class`"),
        ({"task": ":C"}, "task: ':C' names no class. Write `package.module:Class` or `file.py:Class`"),
        # settings that do not exist
        ({"agnets": 1}, "agnets: there is no such setting. Did you mean `agents`?"),
        ({"agents": {"mn": 4}}, "agents.mn: there is no such setting. Did you mean `min`?"),
        ({"local": {"optimiser": {}}}, "local.optimiser: there is no such setting. Did you mean `optimizer`?"),
        ({"stop": {"target": {"metrc": "x"}}}, "stop.target.metrc: there is no such setting. Did you mean `metric`?"),
        ({"partition": {"kind": "dirichlet", "alhpa": 1}}, "partition.alhpa: there is no such setting. Did you mean `alpha`?"),
        ({"mix": {"zzz": 1}}, "mix.zzz: there is no such setting. Known here: alpha, kind"),
        ({"iid": True}, "iid: there is no such setting. Known here: agents, evaluate, keep_models, local, merge, mix, name, "
         "outer, partition, seed, sim, stop, sync, task, task_options, v, wire"),
        ({"wire": {"natural": 1}}, "wire.natural: there is no such setting. Known here: chunk_bytes, codec, window"),
        # values out of range or of the wrong type
        ({"agents": {"min": 0}}, "agents.min: 0 is not accepted. Input should be greater than or equal to 1"),
        ({"agents": {"min": 1.5}}, "agents.min: 1.5 is not accepted. Input should be a valid integer, got a number with a "
         "fractional part"),
        ({"agents": 4}, "agents: 4 is not accepted. Write settings under it: lost_after_s, max, min"),
        ({"sync": {"kind": "async", "staleness": "hinge"}}, "sync.staleness: 'hinge' is not accepted. Write settings under "
         "it: a, b, kind"),
        ({"task_options": 4}, "task_options: 4 is not accepted. Write settings under it"),
        ({"mix": {"alpha": 2}}, "mix.alpha: 2 is not accepted. Input should be less than 2"),
        ({"mix": {"alpha": float("nan")}}, "mix.alpha: nan is not accepted. Input should be a finite number"),
        ({"outer": {"lr": 0}}, "outer.lr: 0 is not accepted. Input should be greater than 0"),
        ({"seed": -1}, "seed: -1 is not accepted. Input should be greater than or equal to 0"),
        ({"keep_models": 1}, "keep_models: 1 is not accepted. Input should be greater than or equal to 2"),
        ({"merge": {"rule": "meadian"}}, "merge.rule: 'meadian' is not accepted. Use one of mean, median, trimmed_mean, "
         "norm_clip, centred_clip, krum, multi_krum, geometric_median"),
        ({"merge": {"f": 2}}, "merge.f: there is no such setting with rule mean. It belongs to krum, multi_krum"),
        ({"merge": {"rule": "norm_clip"}}, "merge.max_norm: is missing. Add it"),
        ({"agents": {"min": 9}, "merge": {"rule": "trimmed_mean", "trim": 1.5}}, "merge.trim: 1.5 is neither a whole number "
         "nor a share below 0.5"),
        ({"outer": {"kind": "sgd", "momentum": 0.9}}, "outer.momentum: there is no such setting with kind sgd. It belongs to "
         "momentum, nesterov, delayed_nesterov"),
        ({"outer": {"kind": "delayed_nesterov"}}, "outer.every: is missing. Add it"),
        ({"sync": {"kind": "sync"}}, "sync.kind: 'sync' is not accepted. Use one of rounds, async"),
        ({"partition": {"kind": "dir"}}, "partition.kind: 'dir' is not accepted. Use one of iid, dirichlet, shards, natural"),
        ({"partition": {"alpha": 1}}, "partition.kind: is missing. Use one of iid, dirichlet, shards, natural"),
        ({"local": {"optimizer": {"kind": "adam", "lr": -1}}}, "local.optimizer.lr: -1 is not accepted. Input should be "
         "greater than or equal to 0"),
        ({"local": {"prox_mu": -1}}, "local.prox_mu: -1 is not accepted. Input should be greater than or equal to 0"),
        ({"local": {"clip_norm": 0}}, "local.clip_norm: 0 is not accepted. Input should be greater than 0"),
        ({"local": {"seconds": 0}}, "local.seconds: 0 is not accepted. Input should be greater than 0"),
        ({"local": {"schedule": {"per": "step"}}}, "local.schedule.kind: is missing. Add it"),
        ({"local": {"schedule": {"kind": "step", "per": "epoch"}}}, "local.schedule.per: 'epoch' is not accepted. Input should "
         "be 'period' or 'step'"),
        # settings that have no meaning beside others
        ({"local": {"steps": 5, "epochs": 1}}, "local: both steps and epochs are given; leave one out"),
        ({"local": {"steps": 5, "seconds": 1}}, "local: both steps and seconds are given; leave one out"),
        ({"local": {"steps": 5, "max_steps": 9}}, "local: max_steps bounds a period of `seconds`, which is not "
         "given; use `steps`"),
        ({"merge": {"normalize": "fednova"}, "mix": {"alpha": 0.5}}, "merge.normalize: fednova divides what a period has "
         "changed by its steps, and with mix = interpolate 0.5 an update holds more than that. Leave mix.alpha at 1, or leave "
         "merge.normalize out"),
        ({"stop": {"target": {"metric": "loss"}}}, "stop.target: give either at_least or at_most"),
        ({"stop": {"target": {"at_least": 1, "at_most": 2}}}, "stop.target: give either at_least or at_most"),
        ({"agents": {"min": 4, "max": 2}}, "agents.max: 2 is below agents.min = 4. Raise it or leave it out"),
        ({"agents": {"min": 2}, "sync": {"quorum": 3}}, "sync.quorum: 3 is above the number of agents the run starts with "
         "(agents.min = 2). Use at most 2, or leave it out, or raise agents.min"),
        ({"agents": {"min": 4}, "partition": {"kind": "iid", "parts": 3}}, "partition.parts: 3 parts are too few for "
         "agents.min = 4. Every agent needs a part of its own: raise it or leave it out"),
        ({"agents": {"min": 4}, "merge": {"rule": "krum"}}, "agents.min: 4 is too few for merge.rule = krum, which needs 5 "
         "updates in every merge. Use at least 5, or lower merge.f"),
        ({"agents": {"min": 2}, "merge": {"rule": "median"}}, "agents.min: 2 is too few for merge.rule = median, which needs "
         "3 updates in every merge. Use at least 3, or use another merge.rule"),
        ({"agents": {"min": 9}, "merge": {"rule": "trimmed_mean", "trim": 0.1}}, "agents.min: 9 is too few for merge.rule = "
         "trimmed_mean, which needs 10 updates in every merge. Use at least 10, or set merge.trim to a number of values"),
        ({"agents": {"min": 9}, "merge": {"rule": "multi_krum", "m": 20}}, "agents.min: 9 is too few for merge.rule = "
         "multi_krum, which needs 20 updates in every merge. Use at least 20, or lower merge.m"),
        ({"agents": {"min": 9}, "sync": {"quorum": 6}, "merge": {"rule": "krum", "f": 2}}, "sync.quorum: 6 is too few for "
         "merge.rule = krum, which needs 7 updates in every merge. Use at least 7, or lower merge.f"),
        ({"agents": {"min": 9}, "sync": {"kind": "async", "buffer": 4}, "merge": {"rule": "krum"}}, "sync.buffer: 4 is too "
         "few for merge.rule = krum, which needs 5 updates in every merge. Use at least 5, or lower merge.f"),
        ({"agents": {"min": 9}, "sync": {"kind": "async", "buffer": 6, "max_ahead": 2}, "merge": {"rule": "krum"}},
         "sync.buffer: 6 beside sync.max_ahead = 2 and merge.rule = krum, which needs 5 updates: fast agents would wait for "
         "a slow one, and its update for theirs. Use `buffer: all`, or leave sync.max_ahead out"),
        ({"agents": {"min": 9, "max": 200}, "merge": {"rule": "geometric_median"}}, "agents.max: 200 agents are too many for "
         "merge.rule = geometric_median, which compares every update with every other one. Use at most 128, or median or "
         "trimmed_mean, which take any number"),
        ({"agents": {"min": 9}, "merge": {"rule": "median", "weights": "samples"}}, "merge.weights: 'samples' beside "
         "merge.rule = median, which takes all updates as equals: an agent must not gain weight by what it says of itself. "
         "Leave merge.weights out, or use mean, norm_clip or geometric_median, which have weights"),
        # versions
        ({"v": 2}, "v: the spec has version 2, this Syncline reads up to 1. Upgrade Syncline here, or write the spec for the "
         "older version"),
        ({"v": "one"}, "v: 'one' is not a spec version. Use 1"),
        ({"v": 0}, "v: 0 is not a spec version. Use 1"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_setting_value_and_mend(settings: dict[str, Any], words: str) -> None:
    assert str(refused(**settings)) == words


@pytest.mark.parametrize("rule", ["mean", "norm_clip", "geometric_median"])
def test_rules_that_have_weights_take_them(rule: str) -> None:
    assert RULES[rule].weighted
    more = {"max_norm": 1.0} if rule == "norm_clip" else {}
    made = parse(
        RunSpec, {"task": "a.b:C", "agents": {"min": 9}, "merge": {"rule": rule, "weights": "samples", **more}}
    )
    assert made.merge.weights == "samples"
    assert sorted(r for r, kind in RULES.items() if kind.weighted) == ["geometric_median", "mean", "norm_clip"]


def test_a_mistake_names_its_setting_apart_from_the_words() -> None:
    error = refused(agents={"mn": 4})
    assert (error.setting, error.problem, error.hint) == (
        "agents.mn",
        "there is no such setting",
        "Did you mean `min`?",
    )


def test_all_mistakes_are_told_at_once() -> None:
    assert str(refused(seed=-1, mix={"alpha": "half"}, agnts={})).splitlines() == [
        "mix.alpha: 'half' is not accepted. Input should be a valid number, unable to parse string as a number",
        "seed: -1 is not accepted. Input should be greater than or equal to 0",
        "agnts: there is no such setting. Did you mean `agents`?",
    ]


def test_a_quorum_is_a_number_or_all() -> None:
    assert str(refused(sync={"quorum": "most"})) == (
        "sync.quorum: 'most' is not accepted. Input should be 'all', or input should be a valid integer, unable to parse "
        "string as an integer"
    )


def test_the_task_must_be_named() -> None:
    with pytest.raises(ConfigError, match=r"^task: is missing. Add it$"):
        parse(RunSpec, {})


@pytest.mark.parametrize(("data", "kind"), [([], "list"), ("task", "str")])
def test_a_spec_is_a_mapping(data: Any, kind: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(RunSpec, data)
    assert str(error.value) == f"spec: is a {kind}, not a mapping. Start with a line like `task: …`"


# -- files -------------------------------------------------------------------------------------------------------------
def test_overrides_replace_settings_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(EXAMPLE)
    assert load_spec(path, name="other", seed=1).model_copy(update={"name": "digits", "seed": 7}) == load_spec(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = tmp_path / "none.yaml"
    with pytest.raises(ConfigError) as error:
        load_spec(path)
    assert str(error.value) == f"spec: {path}: No such file or directory. Name a YAML file that you can read"


@pytest.mark.parametrize("content", [b"task: [", b"a: b: c", b"\xff\xfe\x00", b"task: !!python/object:os.system {}"])
def test_a_file_that_is_no_yaml_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "spec.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"spec: .*spec\.yaml is not YAML: "):
        load_spec(path)


def test_an_empty_file_is_no_spec(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"^spec: is empty\. Start with a line like `task: …`$"):
        load_spec(tmp_path / "spec.yaml", seed=1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("task: a.b:C\nseed: 1\ntask: a.b:D\n", "task: stands twice, again in line 3. Leave one of them"),
        ("task: a.b:C\nagents: {min: 1, min: 2}\n", "agents.min: stands twice, again in line 2. Leave one of them"),
    ],
)
def test_a_setting_that_stands_twice_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "spec.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        load_spec(tmp_path / "spec.yaml")
    assert str(error.value) == said


def test_a_number_with_an_exponent_reaches_torch_as_a_number(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(
        "task: a.b:C\n"
        "task_options: {decay: 1e-4}\n"
        "local: {steps: 1e3, optimizer: {kind: adamw, lr: 1e-3, weight_decay: 1e-4, betas: [9e-1, 0.99]}, "
        "schedule: {kind: cosine, T_max: 10, eta_min: 1e-5}}\n"
    )
    made = load_spec(tmp_path / "spec.yaml")
    assert made.local.optimizer.arguments == {"lr": 1e-3, "weight_decay": 1e-4, "betas": (0.9, 0.99)}
    assert made.local.schedule is not None and made.local.schedule.arguments == {"T_max": 10, "eta_min": 1e-5}
    assert made.task_options == {"decay": 1e-4} and made.local.steps == 1000


def test_a_value_that_no_kind_accepts_is_told_once() -> None:
    with pytest.raises(ConfigError) as error:
        parse(RunSpec, {"task": "a.b:C", "sync": {"kind": "async", "buffer": 0}})
    assert str(error.value).count("sync.buffer") == 1 and "'all', or " in str(error.value)


# -- what settings mean ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("local", "rows", "steps"),
    [
        ({}, 100, 20),
        ({"steps": 0}, 100, 0),
        ({"steps": 7}, 100, 7),
        ({"epochs": 2, "batch_size": 32}, 100, 8),  # the last batch is short
        ({"epochs": 1, "batch_size": 25}, 100, 4),
        ({"epochs": 2, "batch_size": 33}, 100, 6),  # the one row left over is in the last of three batches
        ({"epochs": 2, "batch_size": 1}, 3, 6),
        ({"epochs": 1, "batch_size": 32}, 1, 1),
        ({"epochs": 3, "batch_size": "all"}, 100, 3),
        ({"epochs": 1, "batch_size": 32}, 0, 0),
        ({"epochs": 1, "batch_size": "all"}, 0, 0),
        ({"seconds": 2.5}, 100, 1_000_000),
        ({"seconds": 2.5, "max_steps": 7}, 100, 7),
    ],
)
def test_a_local_period_is_so_many_steps(local: dict[str, Any], rows: int, steps: int) -> None:
    assert Local(**local).steps_for(rows) == steps


def test_an_optimizer_takes_the_arguments_of_its_kind() -> None:
    assert Optimizer(kind="adam", lr=0.001, weight_decay=0.01).arguments == {"lr": 0.001, "weight_decay": 0.01}
    assert Optimizer(kind="adam", betas=[0.8, 0.9]).arguments == {"betas": (0.8, 0.9)}, "torch has a rate of its own"
    assert Optimizer().arguments == Optimizer(kind="SGD").arguments == {"lr": 0.1}


@pytest.mark.parametrize(
    ("target", "reached", "not_yet"),
    [({"at_least": 0.9}, (0.9, 0.91), (0.899, -1.0)), ({"at_most": 0.0}, (0.0, -0.1), (0.01,))],
)
def test_a_target_is_a_bound(target: dict[str, float], reached: tuple[float, ...], not_yet: tuple[float, ...]) -> None:
    made = Target(metric="m", **target)
    assert all(made.reached(v) for v in reached) and not any(made.reached(v) for v in (*not_yet, float("nan")))


def test_settings_that_are_rarely_meant_are_warned_of() -> None:
    assert spec(mix={"alpha": 1.5}).warnings == [
        "mix.alpha: 1.5 over-relaxes: agents jump past the center. Up to 1 is monotone"
    ]
    (warning,) = spec(mix={"alpha": 0}, agents={"min": 2}).warnings
    assert warning.startswith("mix.alpha: 0 trains every agent alone")
    assert spec(mix={"alpha": 0}).warnings == [], "one agent is alone anyway"


def test_seconds_with_uniform_weights_are_warned_of() -> None:
    (warning,) = spec(agents={"min": 2}, local={"seconds": 3}).warnings
    assert warning.startswith("merge.weights: uniform with local.seconds") and "merge.normalize: fednova" in warning
    for merge in ({"weights": "steps"}, {"weights": "samples"}, {"normalize": "fednova"}):
        assert spec(agents={"min": 2}, local={"seconds": 3}, merge=merge).warnings == []
