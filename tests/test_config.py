"""Test TICGRPOConfig: algorithms, explicit values, errors, round trips, parsers."""

import dataclasses
import json
import re
import warnings

import pytest
import torch
from conftest import CPU
from trl import GRPOConfig, ModelConfig, TrlParser

from tic_grpo_trl import ALGORITHMS, TICGRPOConfig
from tic_grpo_trl.algorithms import ALGORITHM_FIELDS, ALIASES


def config(**fields) -> TICGRPOConfig:
    return TICGRPOConfig(output_dir="unused", **CPU | fields)


# The table of the papers' algorithms: level, clip mode, loss type, scaling, ε_low, ε_high, δ, σ of cap and floor
TABLE = {
    "tic_grpo": ("trajectory", "up_only", "dr_grpo", "none", None, 0.28, None, None, None),
    "tic_grpo_released": ("trajectory", "up_only", "dr_grpo", "group", None, None, 3.0, 0.01, None),
    "tic_grpo_capped": ("trajectory", "capped", "dr_grpo", "none", None, 0.28, None, None, None),
    "tic_grpo_truncated": ("trajectory", "truncated", "dr_grpo", "none", 0.2, 0.28, None, None, None),
    "tic_grpo_v2": ("trajectory", "up_only", "grpo", "group", None, 0.28, None, None, None),
    "grpo": ("token", "two_sided", "dapo", "none", 0.2, 0.28, None, None, None),
    "dapo": ("token", "two_sided", "dapo", "none", 0.2, 0.28, None, None, None),
    "grpo2": ("token", "up_only", "dr_grpo", "none", None, 0.28, None, None, None),
    "grpo_ub_clip": ("token", "up_only", "dr_grpo", "none", None, 0.28, None, None, None),
    "grpo_traj_is": ("trajectory", "two_sided", "dapo", "none", 0.2, 0.28, None, None, None),
    "gspo": ("sequence", "two_sided", "grpo", "group", 3e-4, 4e-4, None, None, None),
    "cispo": ("token", "two_sided", "cispo", "batch", None, 5.0, None, None, None),
    "sapo": ("token", "two_sided", "sapo", "group", None, None, None, None, None),
    "luspo": ("sequence", "two_sided", "luspo", "group", 2e-3, 2.5e-3, None, None, None),
    "vespo": ("token", "two_sided", "vespo", "group", None, None, None, None, None),
    "grpo_no_is": ("none", "none", "dapo", "none", None, None, None, None, None),
    "seq_tis": ("trajectory", "capped", "dr_grpo", "none", None, 1.0, None, None, None),
    "seq_mis": ("trajectory", "masked", "dr_grpo", "none", 1.0, 2.0, None, None, None),
    "vcpo": ("trajectory", "capped", "dr_grpo", "none", None, 7.0, None, None, None),
    "tic_grpo_adaptive": ("trajectory", "adaptive", "dr_grpo", "none", None, None, None, None, None),
    "ctpo": ("prefix", "dual_clip", "dr_grpo", "none", None, None, None, 0.05, 0.025),
}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_algorithms_resolve_to_the_table(algorithm):
    args = config(algorithm=algorithm)
    names = ("importance_sampling_level", "clip_mode", "loss_type", "scale_rewards")
    names += ("epsilon", "epsilon_high", "delta", "length_scaled_cap", "length_scaled_floor")
    assert tuple(getattr(args, name) for name in names) == TABLE[algorithm]
    resolved = {"algorithm": algorithm} | dict(zip(names, TABLE[algorithm], strict=True))
    resolved |= {"advantage_baseline": "group_mean", "scale_lr_by_ess": False}
    if algorithm == "vcpo":
        resolved |= {"advantage_baseline": "minimum_variance", "scale_lr_by_ess": True}
    assert args.resolved_algorithm == resolved
    assert args.uses_mini_batch == (algorithm in ("vcpo", "tic_grpo_adaptive"))
    assert args.is_anchored == (algorithm not in ("grpo", "dapo", "gspo", "cispo", "sapo", "luspo", "vespo"))
    assert args.beta == 0.0


@pytest.mark.parametrize(("alias", "name"), ALIASES.items())
def test_an_alias_is_its_algorithm(alias, name):
    assert config(algorithm=alias).resolved_algorithm == config(algorithm=name).resolved_algorithm | {
        "algorithm": alias
    }


def test_default_is_tic_grpo():
    assert config().algorithm == "tic_grpo"
    assert config().resolved_algorithm == config(algorithm="tic_grpo").resolved_algorithm


def test_every_algorithm_has_only_known_fields():
    assert all(set(fields) <= set(ALGORITHM_FIELDS) for fields in ALGORITHMS.values())
    assert set(ALGORITHM_FIELDS) <= {field.name for field in dataclasses.fields(TICGRPOConfig)}
    unset = {f.name: f.default for f in dataclasses.fields(TICGRPOConfig) if f.name in ALGORITHM_FIELDS}
    assert set(unset.values()) == {None}


def test_new_fields_have_help_and_are_documented():
    inherited = {field.name for field in dataclasses.fields(GRPOConfig)}
    for field in dataclasses.fields(TICGRPOConfig):
        if field.name not in inherited or field.name in ALGORITHM_FIELDS:
            assert f"        {field.name} (`" in TICGRPOConfig.__doc__
            assert " ".join(field.metadata["help"].split()) in " ".join(TICGRPOConfig.__doc__.split())


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"algorithm": "tic_grpo", "epsilon_high": 0.03}, {"epsilon_high": 0.03}),
        ({"algorithm": "tic_grpo", "loss_type": "grpo"}, {"loss_type": "grpo", "clip_mode": "up_only"}),
        ({"algorithm": "grpo", "scale_rewards": "group"}, {"scale_rewards": "group"}),
        ({"scale_rewards": True}, {"scale_rewards": "group"}),
        ({"scale_rewards": False}, {"scale_rewards": "none"}),
        ({"algorithm": "tic_grpo", "clip_mode": "two_sided"}, {"epsilon": 0.2, "epsilon_high": 0.28}),
        ({"algorithm": "grpo", "clip_mode": "up_only"}, {"epsilon": None, "epsilon_high": 0.28}),
        ({"algorithm": "tic_grpo", "importance_sampling_level": "none"}, {"clip_mode": "none", "epsilon_high": None}),
        ({"algorithm": "grpo_no_is", "importance_sampling_level": "trajectory"}, {"clip_mode": "up_only"}),
        ({"algorithm": "grpo_no_is", "importance_sampling_level": "token"}, {"clip_mode": "two_sided", "epsilon": 0.2}),
        ({"algorithm": "tic_grpo_released", "epsilon_high": 0.2}, {"length_scaled_cap": None, "delta": 3.0}),
        ({"algorithm": "tic_grpo_released", "length_scaled_cap": 0.0}, {"epsilon_high": 0.28, "delta": 3.0}),
        ({"algorithm": "tic_grpo_released", "clip_mode": "truncated"}, {"delta": None, "length_scaled_cap": 0.01}),
        ({"algorithm": "tic_grpo_released", "importance_sampling_level": "token"}, {"length_scaled_cap": None}),
        ({"algorithm": "tic_grpo", "length_scaled_cap": 0.02}, {"epsilon_high": None, "length_scaled_cap": 0.02}),
        ({"algorithm": "tic_grpo_released", "delta": float("inf")}, {"delta": float("inf")}),
        ({"algorithm": "tic_grpo_released", "importance_sampling_level": "prefix"}, {"length_scaled_cap": 0.01}),
        ({"algorithm": "grpo_no_is", "importance_sampling_level": "prefix"}, {"clip_mode": "dual_clip"}),
        ({"algorithm": "ctpo", "epsilon": 0.2}, {"epsilon": 0.2, "length_scaled_floor": None, "epsilon_high": None}),
        ({"algorithm": "ctpo", "length_scaled_floor": 0.0}, {"epsilon": 0.2, "length_scaled_cap": 0.05}),
        ({"algorithm": "ctpo", "clip_mode": "capped"}, {"length_scaled_floor": None, "length_scaled_cap": 0.05}),
        ({"algorithm": "ctpo", "importance_sampling_level": "token"}, {"epsilon": 0.2, "epsilon_high": 0.28}),
        ({"algorithm": "vcpo", "scale_lr_by_ess": False}, {"scale_lr_by_ess": False, "uses_mini_batch": True}),
        (
            {"algorithm": "vcpo", "advantage_baseline": "group_mean", "scale_lr_by_ess": "no"},
            {"uses_mini_batch": False},
        ),
        ({"algorithm": "seq_mis", "length_scaled_floor": 0.5}, {"epsilon": None, "epsilon_high": 2.0}),
    ],
)
def test_an_explicit_value_wins(fields, expected):
    args = config(**fields)
    assert {name: getattr(args, name) for name in expected} == expected


REFUSED = [
    ({"algorithm": "ticgrpo"}, r"Unknown algorithm 'ticgrpo'. Did you mean 'tic_grpo'\? Choose one of tic_grpo,"),
    ({"importance_sampling_level": "trajektory"}, r"Unknown importance_sampling_level 'trajektory'"),
    ({"clip_mode": "upper"}, r"Unknown clip_mode 'upper'. Choose one of up_only"),
    ({"loss_type": "drgrpo"}, r"Unknown loss_type 'drgrpo'"),
    ({"scale_rewards": "std"}, r"Unknown scale_rewards 'std'"),
    (
        {"algorithm": "grpo_no_is", "length_scaled_cap": 0.1},
        r"length_scaled_cap=0.1 has no effect with clip_mode='none'",
    ),
    ({"loss_type": "vespo", "length_scaled_cap": 0.1}, r"length_scaled_cap=0.1 has no effect with loss_type='vespo'"),
    (
        {"algorithm": "grpo_no_is", "clip_mode": "up_only"},
        r"importance_sampling_level='none' cannot be combined with clip_mode",
    ),
    ({"clip_mode": "none"}, r"importance_sampling_level='trajectory' cannot be combined with clip_mode='none'"),
    ({"epsilon_high": 0.2, "length_scaled_cap": 0.01}, r"both set the upper bound of the weight: remove one"),
    (
        {"algorithm": "seq_mis", "epsilon": 0.2, "length_scaled_floor": 0.01},
        r"epsilon=0.2 and length_scaled_floor=0.01 both set the lower bound of the weight: remove one",
    ),
    ({"length_scaled_floor": 0.01}, r"length_scaled_floor=0.01 has no effect with clip_mode='up_only': remove"),
    (
        {"algorithm": "grpo", "length_scaled_floor": 0.01},
        r"length_scaled_floor=0.01 bounds a trajectory ratio, .*='token': remove it, or set .*'trajectory' or 'prefix'",
    ),
    (
        {"algorithm": "ctpo", "length_scaled_floor": -1.0},
        r"length_scaled_floor=-1.0 must be in \[0, inf\), for example 0.025",
    ),
    ({"algorithm": "grpo2", "length_scaled_cap": 0.01}, r"length_scaled_cap=0.01 bounds a trajectory ratio"),
    ({"max_completion_length": None}, r"loss_type='dr_grpo' divides by the constant T = max_completion_length"),
    ({"epsilon_high": -0.1}, r"epsilon_high=-0.1 must be in \(0, inf\), for example 0.28"),
    ({"epsilon_high": float("nan")}, r"epsilon_high=nan must be in \(0, inf\)"),
    ({"length_scaled_cap": -1.0}, r"length_scaled_cap=-1.0 must be in \[0, inf\), for example 0.01"),
    ({"algorithm": "grpo", "epsilon": 1.5}, r"epsilon=1.5 must be in \(0, 1\]"),
    ({"delta": 1.1}, r"delta=1.1 must be greater than 1 \+ epsilon_high = 1.28"),
    *[
        (
            {"loss_type": loss_type, "importance_sampling_level": "trajectory"},
            rf"loss_type='{loss_type}' defines its own importance weight.*choose a loss_type of",
        )
        for loss_type in ("cispo", "sapo", "luspo", "vespo")
    ],
    ({"clip_mode": "up_only", "loss_type": "cispo"}, r"loss_type='cispo' defines its own importance weight"),
    (
        {"clip_mode": "adaptive", "algorithm": "grpo"},
        r"clip_mode='adaptive' caps a product of token ratios, .*importance_sampling_level='token': set .*'trajectory'",
    ),
    (
        {"algorithm": "tic_grpo_adaptive", "gradient_accumulation_steps": 2, "steps_per_generation": 1},
        r"needs updates of one rollout each, but steps_per_generation=1 is not a multiple of gradient_accumulation_",
    ),
    (
        {"algorithm": "tic_grpo_adaptive", "epsilon_high": 1.0, "length_scaled_cap": 0.1},
        r"length_scaled_cap=0.1 has no effect with clip_mode='adaptive': remove",
    ),
    ({"algorithm": "vcpo", "scale_rewards": "group"}, r"cannot be combined with scale_rewards='group': set scale_rewa"),
    (
        {"algorithm": "vcpo", "multi_objective_aggregation": "normalize_then_sum"},
        r"minimum_variance' replaces .* be combined with multi_objective_aggregation='normalize_then_sum': set multi_ob"
        r"jective_aggregation='sum_then_normalize', or advantage_baseline='group_mean'",
    ),
    *[
        (
            rule | {"max_carry_over": 2, "behaviour_policy": "trainer", "use_vllm": True},
            rf"{name} needs ratios to the policies that sampled .*max_carry_over=2 and behaviour_policy='trainer' .*: "
            r"set behaviour_policy='sampler'",
        )
        for name, rule in {
            "clip_mode='adaptive'": {"algorithm": "tic_grpo_adaptive"},
            "advantage_baseline='minimum_variance'": {"algorithm": "vcpo", "scale_lr_by_ess": False},
            "scale_lr_by_ess=True": {"algorithm": "vcpo", "advantage_baseline": "group_mean"},
        }.items()
    ],
    (
        {"algorithm": "vcpo", "partition_by_prompt": False, "updates_per_rollout": 2},
        r"needs mini-batches of complete groups, which partition_by_prompt=False splits: set partition_by_prompt=True",
    ),
    (
        {"scale_lr_by_ess": True, "gradient_accumulation_steps": 2, "steps_per_generation": 3},
        r"scale_lr_by_ess=True needs updates of one rollout each, but steps_per_generation=3 is not a multiple of grad",
    ),
    ({"algorithm": "vcpo", "optim": "adalomo"}, r"but optim='adalomo' updates weights without it, .*choose another"),
    ({"advantage_baseline": "median"}, r"Unknown advantage_baseline 'median'"),
    ({"gradient_noise_scale": 0.0}, r"gradient_noise_scale=0.0 must be in \(0, inf\), for example 20.0"),
    ({"min_ess": 0.1, "fp16": True}, r"min_ess=0.1 skips updates, .* fp16=True .*: set fp16=False .*or remove min_ess"),
    (
        {"generation_batch_size": 32, "steps_per_generation": 2},
        r"generation_batch_size=32 contradicts steps_per_generation=2, which makes it 16",
    ),
    (
        {"generation_batch_size": 16, "updates_per_rollout": 4},
        r"generation_batch_size=16 contradicts updates_per_rollout=4, which makes it 32: remove one of them",
    ),
    (
        {"responses_per_update": 64, "gradient_accumulation_steps": 4},
        r"gradient_accumulation_steps 4 contradicts responses_per_update 64, which with per_device_train_batch_size 8 "
        r"x 1 process makes it 8: remove one of them. Nearest: gradient_accumulation_steps 8; or responses_per_update "
        r"32\.",
    ),
    (
        {"updates_per_rollout": 4, "steps_per_generation": 5, "gradient_accumulation_steps": 2},
        r"steps_per_generation 5 contradicts updates_per_rollout 4, which with gradient_accumulation_steps 2 makes it "
        r"8: remove one of them. Nearest: steps_per_generation 8\.",
    ),
    (
        {"responses_per_eval_batch": 64, "per_device_eval_batch_size": 16},
        r"per_device_eval_batch_size 16 contradicts responses_per_eval_batch 64, which with 1 process makes it 64",
    ),
    ({"responses_per_update": 0}, r"responses_per_update=0 must be in \[1, inf\), for example 512"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_contradictions_are_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields)


def test_vllm_corrections_by_token_go_with_weights_by_token(tmp_path):
    def config(mode, **fields):
        return TICGRPOConfig(str(tmp_path), **CPU, use_vllm=True, vllm_importance_sampling_mode=mode, **fields)

    for mode in ("token_truncate", "token_mask"):
        with pytest.raises(
            ValueError, match=f"vllm_importance_sampling_mode='{mode}' gives every token its own factor"
        ):
            config(mode)
        with pytest.raises(ValueError, match="a product of token ratios as the weight"):
            config(mode, algorithm="ctpo")
        for fits in (
            {"algorithm": "grpo"},
            {"algorithm": "gspo"},
            {"algorithm": "grpo_no_is"},
            {"behaviour_policy": "sampler"},
        ):
            config(mode, **fits)
        config(mode, vllm_importance_sampling_correction=False)
    config("sequence_mask")
    config("sequence_truncate")
    with pytest.raises(
        ValueError, match=r"Unknown vllm_importance_sampling_mode 'sequence'\. Did you mean 'sequence_mask'"
    ):
        config("sequence")
    TICGRPOConfig(str(tmp_path), **CPU, vllm_importance_sampling_mode="token_mask")  # without vLLM it is not read


@pytest.mark.parametrize("algorithm", ["tic_grpo", "grpo2"])
@pytest.mark.parametrize("loss_type", ["cispo", "sapo", "luspo", "vespo"])
def test_an_explicit_loss_type_of_trl_brings_its_weight(algorithm, loss_type):
    args = config(algorithm=algorithm, loss_type=loss_type)
    assert (args.importance_sampling_level, args.clip_mode) == ("token", "two_sided")
    assert args.loss_type == loss_type
    assert not args.is_anchored
    bounds = {"cispo": (None, 5.0), "luspo": (0.2, 0.28)}.get(loss_type, (None, None))
    assert (args.epsilon, args.epsilon_high, args.delta) == (*bounds, None)
    assert args.notes == [
        f"loss_type='{loss_type}' defines its own weight: using importance_sampling_level='token', "
        "clip_mode='two_sided' instead of the algorithm's."
    ]


@pytest.mark.parametrize("loss_type", ["cispo", "sapo", "luspo", "vespo"])
def test_vcpo_with_a_loss_type_of_trl_keeps_its_other_rules(loss_type):
    args = config(algorithm="vcpo", loss_type=loss_type)
    assert (args.advantage_baseline, args.scale_lr_by_ess) == ("minimum_variance", True)
    kept = "keeps advantage_baseline='minimum_variance' and scale_lr_by_ess=True of algorithm='vcpo'."
    assert args.notes[1:] == [f"loss_type={loss_type!r} {kept}"]
    assert len(config(algorithm="vcpo", loss_type=loss_type, clip_mode="two_sided", scale_lr_by_ess=False).notes) == 2
    chosen = {"advantage_baseline": "group_mean", "scale_lr_by_ess": True}
    assert len(config(algorithm="vcpo", loss_type=loss_type, **chosen).notes) == 1


def test_a_loss_type_of_trl_keeps_a_weight_that_goes_with_it():
    sequence = config(algorithm="gspo", loss_type="luspo")
    assert (sequence.importance_sampling_level, sequence.epsilon, sequence.epsilon_high) == ("sequence", 3e-4, 4e-4)
    assert config(algorithm="grpo", loss_type="cispo").epsilon_high == 5.0
    assert config(algorithm="cispo", loss_type="sapo").epsilon_high is None
    for algorithm, loss_type in (("gspo", "luspo"), ("grpo", "cispo"), ("cispo", "sapo")):
        assert config(algorithm=algorithm, loss_type=loss_type).notes == []


def test_a_loss_type_of_the_family_has_its_own_bounds_in_another_algorithm():
    assert (
        config(algorithm="cispo", loss_type="dapo").epsilon,
        config(algorithm="cispo", loss_type="dapo").epsilon_high,
    ) == (
        0.2,
        0.28,
    )
    assert config(algorithm="luspo", loss_type="grpo").epsilon_high == 0.28


@pytest.mark.parametrize(
    ("fields", "expected", "note"),
    [
        ({"epsilon": 0.2}, None, "epsilon=0.2 has no effect with clip_mode='up_only'."),
        (
            {"algorithm": "grpo_no_is", "epsilon_high": 0.2},
            None,
            "epsilon_high=0.2 has no effect with clip_mode='none'.",
        ),
        (
            {"algorithm": "tic_grpo_truncated", "delta": 3.0},
            None,
            "delta=3.0 has no effect with clip_mode='truncated'.",
        ),
        (
            {"baseline_norms": "gradients"},
            "gradients",
            "baseline_norms='gradients' has no effect with advantage_baseline='group_mean'.",
        ),
        (
            {"algorithm": "vcpo", "gradient_noise_scale": 5.0},
            5.0,
            "gradient_noise_scale=5.0 has no effect with clip_mode='capped'.",
        ),
        ({"loss_type": "sapo", "epsilon": 0.2}, None, "epsilon=0.2 has no effect with loss_type='sapo'."),
        (
            {"algorithm": "grpo", "epsilon": 0.1},
            0.1,
            "epsilon=0.1 sets only the lower bound here, unlike in TRL; the upper bound is epsilon_high=0.28.",
        ),
    ],
)
def test_a_bound_carried_over_from_trl_is_taken_or_said_to_be_unused(fields, expected, note):
    args = config(**fields)
    assert getattr(args, list(fields)[-1]) == expected
    assert note in args.notes
    assert config(algorithm="grpo", epsilon=0.1, epsilon_high=0.1).notes == []
    assert config(algorithm="tic_grpo_adaptive", gradient_noise_scale=5.0).notes == []


def test_a_cap_below_one_for_cispo_warns():
    with pytest.warns(UserWarning, match=r"the cap is epsilon_high=0.28 itself, .* Set epsilon_high=5.0") as caught:
        args = config(loss_type="cispo", epsilon_high=0.28)
    assert args.epsilon_high == 0.28
    (warning,) = (warning for warning in caught if "cap is" in str(warning.message))
    assert warning.filename == config.__code__.co_filename  # where the config was made
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        config(loss_type="cispo", epsilon_high=1.5)
        config(algorithm="cispo")


@pytest.mark.parametrize(
    ("fields", "changed"),
    [
        ({}, {}),
        ({"top_p": 0.95}, {"top_p": 0.95}),
        ({"top_k": 50, "min_p": 0.1}, {"top_k": 50, "min_p": 0.1}),
        ({"repetition_penalty": 1.1, "generation_kwargs": {"top_k": -1, "min_p": 0.0}}, {"repetition_penalty": 1.1}),
        ({"top_k": 50, "generation_kwargs": {"top_k": 20}}, {"top_k": 20}),
        ({"generation_kwargs": '{"top_p": 0.9}'}, {"top_p": 0.9}),
    ],
)
def test_what_makes_the_sampler_another_policy(fields, changed):
    """The warning comes with the first rollout, where it can be measured (tests/safety/test_ratio_probe.py)."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert config(**fields).changed_sampling == changed


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_round_trips(algorithm, tmp_path):
    args = config(algorithm=algorithm, steps_per_generation=4, learning_rate=3e-4)
    from_dict = TICGRPOConfig(**args.to_dict())
    assert from_dict.to_dict() == args.to_dict()
    from_json = TICGRPOConfig(**json.loads(args.to_json_string()))
    assert from_json.to_dict() == args.to_dict()
    torch.save(args, tmp_path / "training_args.bin")  # what the trainer saves with a model
    loaded = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert loaded.to_dict() == args.to_dict()
    assert dataclasses.replace(args, seed=1).resolved_algorithm == args.resolved_algorithm


def test_batches_follow_from_the_responses_of_an_update():
    args = config(per_device_train_batch_size=4, responses_per_update=64, updates_per_rollout=3)
    assert (args.gradient_accumulation_steps, args.steps_per_generation) == (16, 48)
    assert args.generation_batch_size == 3 * 64
    assert config(updates_per_rollout=4, gradient_accumulation_steps=2).steps_per_generation == 8
    assert config(responses_per_update=64).steps_per_generation == 8  # K = 1, TRL's default
    assert config(responses_per_eval_batch=960).per_device_eval_batch_size == 960


def test_batches_that_are_not_set_are_those_of_trl():
    args = config()
    assert (args.gradient_accumulation_steps, args.per_device_eval_batch_size, args.steps_per_generation) == (1, 8, 1)


def test_derived_batches_round_trip():
    args = config(responses_per_update=64, updates_per_rollout=4, responses_per_eval_batch=16)
    saved = json.loads(args.to_json_string())
    assert (saved["gradient_accumulation_steps"], saved["steps_per_generation"]) == (8, 32)
    assert TICGRPOConfig(**saved).to_dict() == args.to_dict()
    assert dataclasses.replace(args, seed=1).steps_per_generation == 32
    with pytest.raises(
        ValueError, match="gradient_accumulation_steps 8 contradicts responses_per_update 32"
    ) as refused:
        TICGRPOConfig(**saved | {"responses_per_update": 32})
    unset = re.search(r"or set (.*) to None if they come from a copied or saved config", str(refused.value)).group(1)
    fresh = TICGRPOConfig(**saved | {"responses_per_update": 32} | dict.fromkeys(unset.split(" and ")))
    assert (fresh.gradient_accumulation_steps, fresh.steps_per_generation) == (4, 16)


@pytest.mark.parametrize(("updates", "steps"), [(None, 4), (4, 16)])
def test_a_copy_derives_its_batches_again(updates, steps):
    args = config(responses_per_update=64, updates_per_rollout=updates)
    copy = dataclasses.replace(args, per_device_train_batch_size=16)
    assert (copy.gradient_accumulation_steps, copy.steps_per_generation) == (4, steps)
    assert copy.generation_batch_size == args.generation_batch_size
    for changed in ("gradient_accumulation_steps", "steps_per_generation", "generation_batch_size"):
        with pytest.raises(ValueError, match="contradicts"):
            dataclasses.replace(args, **{changed: getattr(args, changed) // 2})


def test_a_config_without_responses_per_update_keeps_its_own_rollout():
    args = config(updates_per_rollout=4)
    with pytest.raises(ValueError, match=r"32 contradicts updates_per_rollout=4, .*\(in a copied config, generation_"):
        dataclasses.replace(args, per_device_train_batch_size=16)
    copy = dataclasses.replace(args, per_device_train_batch_size=16, generation_batch_size=None)
    assert copy.generation_batch_size == 64


def parse(tmp_path, yaml: str, *flags: str) -> TICGRPOConfig:
    path = tmp_path / "recipe.yaml"
    path.write_text("output_dir: unused\nuse_cpu: true\nbf16: false\n" + yaml)
    args, _ = TrlParser((TICGRPOConfig, ModelConfig)).parse_args_and_config(["--config", str(path), *flags])
    return args


def test_yaml_and_flags(tmp_path):
    args = parse(tmp_path, "algorithm: tic_grpo_truncated\nepsilon_high: 0.5\nscale_rewards: false\n")
    assert (args.clip_mode, args.epsilon, args.epsilon_high) == ("truncated", 0.2, 0.5)
    assert args.scale_rewards == "none"

    args = parse(tmp_path, "algorithm: tic_grpo\nepsilon_high: 0.5\n", "--algorithm", "grpo", "--scale_rewards", "True")
    assert args.importance_sampling_level == "token"
    assert (args.epsilon_high, args.scale_rewards) == (0.5, "group")  # a flag beats YAML, YAML beats the algorithm

    assert parse(tmp_path, "algorithm: tic_grpo\n", "--epsilon", "0.1").notes == [
        "epsilon=0.1 has no effect with clip_mode='up_only'."
    ]


def test_a_flag_changes_the_batches_of_a_recipe(tmp_path):
    recipe = "responses_per_update: 512\nupdates_per_rollout: 4\nper_device_train_batch_size: 4\n"
    args = parse(tmp_path, recipe, "--responses_per_update", "256")
    assert (args.gradient_accumulation_steps, args.steps_per_generation) == (64, 256)
    args = parse(tmp_path, recipe, "--per_device_train_batch_size", "16", "--updates_per_rollout", "2")
    assert (args.gradient_accumulation_steps, args.steps_per_generation) == (32, 64)


def test_help_renders(capsys):
    with pytest.raises(SystemExit):
        TrlParser((TICGRPOConfig,)).parse_args_and_config(["--help"])
    shown = capsys.readouterr().out
    assert "--length_scaled_cap" in shown
    assert "tic_grpo_released" in shown


def test_float32_by_default_without_an_accelerator():
    assert TICGRPOConfig(output_dir="unused", use_cpu=True).bf16 is False
    assert TICGRPOConfig(output_dir="unused", use_cpu=True, bf16=True).bf16 is True
    assert TICGRPOConfig(output_dir="unused").bf16 is torch.accelerator.is_available()
