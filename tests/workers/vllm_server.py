"""Started by test_vllm_server.py: trains against a vLLM server and writes what happened, one file per process.

Arguments: a folder for the results, the server's address and the names of the runs.

TRL streams weights to a server over NCCL, which needs a GPU: here they take the way over a file. What is synced, when,
and what becomes of the samples stays TRL's."""

from vllm_engine import CARRIED, ROWS, SPANNING, train  # isort: skip (first, because of its settings)

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from trl.generation.vllm_client import VLLMClient


AHEAD = {"oversampling": 3.0}  # enough that it is not all finished before the server hears of the interruption
RUNS = {
    "synced": {},
    "stale": {"sync": False},
    "sampler": {"behaviour_policy": "sampler", "max_steps": 8},
    "lora": {"lora": True, "learning_rate": 5e-3, "max_steps": 8},
    "carried": CARRIED | AHEAD,
    "carried, stale": CARRIED | AHEAD | {"sync": False, "eval_strategy": "no"},
}
# in two processes
HALF = {"per_device_train_batch_size": ROWS // 2}
RUNS |= {"both": HALF | {"max_steps": 8}, "both, sampler": HALF | {"max_steps": 4, "behaviour_policy": "sampler"}}
RUNS |= {"both, carried": CARRIED | AHEAD | HALF, "both, spanning": SPANNING | {"oversampling": 4.0}}


def transfer_by_file(folder: Path):
    def update(self, metadata, named_params):
        weights = {name: tensor.detach().clone().contiguous() for name, tensor in named_params}
        assert [name for name, _, _ in metadata] == list(weights)
        folder.mkdir(exist_ok=True)
        save_file(weights, folder / "model.safetensors")
        call = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        self._post(f"{self.base_url}/collective_rpc", json=call)

    VLLMClient.init_communicator = lambda self, device=0: None
    VLLMClient.update_named_params = update


if __name__ == "__main__":
    folder, address, names = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    rank = os.environ.get("RANK", "0")
    transfer_by_file(folder / "weights")
    for name in names:
        noted = train(folder / "out", vllm_mode="server", vllm_server_base_url=address, **RUNS[name])
        torch.save(noted, folder / f"{name}-{rank}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()
