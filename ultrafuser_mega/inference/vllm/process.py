"""One specialist's vLLM engine in a process of its own: ``python -m ultrafuser_mega.inference.vllm.process FD``.

FD is a socket, on which ``messages`` come and go. Standard input is never written to: where it ends, whoever started
the process is gone, and so is the process, whatever it does or waits for.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import threading
from collections.abc import Mapping
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.inference.vllm.exchange import ABOUT, LOST
from ultrafuser_mega.inference.vllm.messages import Failed, Fresh, Job, Step, Stepped, Up

HOST = "127.0.0.1"


def main() -> None:
    """Load, meet the others, then step whenever it is asked for."""
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # sent to all of a terminal or a service, the starting process's affair
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    pipe = Connection(int(sys.argv[1]))
    try:
        _serve(pipe)
    except EOFError:
        pass
    except BaseException as error:
        with contextlib.suppress(OSError):  # nobody is there to hear it
            pipe.send(_failed(error))
    os._exit(0)  # vLLM's own processes and threads end with it


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


def _failed(error: BaseException) -> Failed:
    text = " ".join(str(error).split())
    about = re.search(rf"{ABOUT} (\d+)", text)
    told = isinstance(error, InputError)
    message = text if told else f"{type(error).__name__}: {text}"
    return Failed(message, told, LOST in text, None if about is None else int(about[1]))


def _serve(pipe: Connection) -> None:
    job: Job = pipe.recv()
    _set_environment(job)
    engine = _load(job)
    cache = engine.vllm_config.cache_config
    pipe.send(Up(cache.num_gpu_blocks - 1, cache.block_size))  # one block of vLLM's stands for none
    port, seconds = pipe.recv()
    engine.collective_rpc(_join, args=(port, job.rows, seconds))
    pipe.send(None)
    while True:
        pipe.send(_step(engine, pipe.recv()))


def _set_environment(job: Job) -> None:
    """What vLLM reads there; before it is imported."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # this process steps it
        "VLLM_USE_V2_MODEL_RUNNER": "0",  # the rows' requests are asked of the first
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if job.devices[0] is None:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # the engines share the cores
        os.environ["OMP_NUM_THREADS"] = str(job.threads)
    else:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else None
        chosen = [str(device) if names is None else names[device] for device in job.devices if device is not None]
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(chosen)


def _load(job: Job) -> Any:
    from vllm import EngineArgs, LLMEngine, ModelRegistry
    from vllm.plugins import load_general_plugins

    from ultrafuser_mega.inference.vllm.plugin import ARCHITECTURES, LOAD_FORMAT

    load_general_plugins()
    if not set(ARCHITECTURES.values()) <= set(ModelRegistry.get_supported_archs()):
        raise InputError("vLLM does not find its plugin: install ultrafuser_mega beside vLLM, with pip, and leave "
                         "'ultrafuser' in VLLM_PLUGINS where that is set")  # fmt: skip
    on_cpu = job.devices[0] is None
    return LLMEngine.from_engine_args(
        EngineArgs(
            model=job.folder,
            load_format=LOAD_FORMAT,
            skip_tokenizer_init=True,
            generation_config="vllm",
            dtype=job.dtype,
            enforce_eager=on_cpu,
            tensor_parallel_size=len(job.devices),
            max_model_len=job.positions,
            max_num_seqs=job.rows,
            # Whole prompts, and a token for every answer beside them: which requests a step takes depends on nothing
            # that differs between engines. What the cache still holds of a prompt makes its step shorter, no more.
            enable_chunked_prefill=False,
            max_num_batched_tokens=job.step_tokens,
            async_scheduling=False,
            enable_prefix_caching=True,
            disable_hybrid_kv_cache_manager=True,
            kv_cache_memory_bytes=job.cache_bytes,
            gpu_memory_utilization=job.gpu_share,
            disable_log_stats=True,
        )
    )


def _join(worker: Any, port: int, rows: int, seconds: float) -> None:
    worker.model_runner.get_model().join(worker.model_runner, HOST, port, rows, timedelta(seconds=seconds))


def _constrain(worker: Any, masks: Mapping[int, bytes]) -> None:
    worker.model_runner.get_model().constrain(masks)


def _take_choices(worker: Any) -> Any:
    return worker.model_runner.get_model().take_choices()


def _step(engine: Any, step: Step) -> Stepped:
    if step.ended:
        engine.abort_request([str(number) for number in step.ended])
    for fresh in step.fresh:
        _add(engine, fresh)
    if step.masks:
        engine.collective_rpc(_constrain, args=(step.masks,))
    tokens, cached, began = {}, {}, {fresh.number for fresh in step.fresh}
    for output in engine.step():
        number = int(output.request_id)
        (tokens[number],) = output.outputs[0].token_ids
        if number in began:
            cached[number] = output.num_cached_tokens or 0
    return Stepped(tokens, cached, engine.collective_rpc(_take_choices)[0])


def _add(engine: Any, fresh: Fresh) -> None:
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    parameters = SamplingParams(
        temperature=0,  # of what is left to choose from
        max_tokens=fresh.longest,
        stop_token_ids=fresh.eos,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        extra_args=fresh.extra,
    )
    engine.add_request(str(fresh.number), TokensPrompt(prompt_token_ids=fresh.prompt), parameters)


if __name__ == "__main__":
    main()
