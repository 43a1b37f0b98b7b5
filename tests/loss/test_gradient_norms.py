"""The norms of responses' own gradients: with an adapter only its parameters count; where weights are sharded, none."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from conftest import batch, logps, make_trainer, tiny_model
from peft import LoraConfig

from tic_grpo_trl.loss.gradient_norms import check_weights_are_whole, logps_and_squared_norms


LORA = LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
SHARDED = [
    (None, DistributedType.FSDP, "FSDP shards the weights: set baseline_norms='tokens', or use DDP or ZeRO-2"),
    (SimpleNamespace(zero_stage=3), DistributedType.DEEPSPEED, "DeepSpeed ZeRO-3 shards the weights"),
]


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("padding_free", [True, False])
def test_norms_and_log_probabilities_are_those_of_plain_logits(tmp_path, peft_config, padding_free):
    torch.manual_seed(0)
    trainer = make_trainer(
        tmp_path, tiny_model(), peft_config=peft_config, padding_free=padding_free, algorithm="vcpo", seed=1
    )
    inputs, passes = batch(tiny_model()), []
    trainer.packed_forward.choose_layout()
    found_logps, found = logps_and_squared_norms(trainer.packed_forward, inputs, passes.append)
    assert len(passes) == 3  # the third response's advantage is 0
    model = trainer.model
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    base = model.get_base_model() if peft_config else model
    logp = logps(base, inputs) * inputs["completion_mask"]
    for i, advantage in enumerate(inputs["advantages"]):
        own = torch.autograd.grad(logp[i].sum(), trained, retain_graph=True)
        expected = sum(gradient.square().sum() for gradient in own).item() if advantage else 0.0
        assert found[i].item() == pytest.approx(expected, rel=1e-4)
        torch.testing.assert_close(found_logps[i], logp[i].detach() * bool(advantage), rtol=1e-4, atol=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(("plugin", "kind", "message"), SHARDED)
def test_sharded_weights_are_refused(plugin, kind, message):
    accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin), distributed_type=kind)
    with pytest.raises(ValueError, match=message):
        check_weights_are_whole(accelerator)


def test_zero2_keeps_weights_whole():
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=2))
    check_weights_are_whole(SimpleNamespace(state=state, distributed_type=DistributedType.DEEPSPEED))
