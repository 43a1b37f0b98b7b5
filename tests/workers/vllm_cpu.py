"""A vLLM engine on a CPU whose weights can be replaced. Started as a script, it is vLLM's server with its arguments."""

import os
import runpy


os.environ.update(  # before vLLM is imported
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",
    OMP_THREAD_LIMIT="1",  # the engine's kernels would start a second thread, which waits by spinning
    DO_NOT_TRACK="1",
    TORCHDYNAMO_DISABLE="1",  # nothing is worth compiling here
    VLLM_CPU_CI_ENV="1",  # for small models: shorter prologues
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
    VLLM_SERVER_DEV_MODE="1",  # TRL needs the server's endpoints for weights
    VLLM_WORKER_MULTIPROC_METHOD="fork",  # the server's engine inherits what follows
)

import vllm._custom_ops
import vllm.model_executor.layers.utils


# Kernels of the CPU build pack the weights, a tied LM head's for good, and new ones would not reach them. GPUs don't.
vllm._custom_ops._supports_onednn = False
vllm.model_executor.layers.utils.check_cpu_sgl_kernel = lambda n, k, dtype: False

if __name__ == "__main__":
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
