"""Other CPU engines for `flashdraft bench`, on the same weights and threads, greedy, from token ids to text.

    flashdraft bench ... --methods "dflash,Q8_0=recipes/engines.py:llama_cpp:q8_0.gguf,CT2=recipes/engines.py:ctranslate2:int8"

A function gets the text behind its name and our Model, and returns what answers a list of prompts; yours may stand in a file
of your own. pip install llama-cpp-python ctranslate2 openvino-genai, or some of them; llama_server wants a server that
recipes/llama_cpp_dflash.sh builds.
"""

import atexit
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from ctypes import c_int32
from http.client import HTTPConnection

import torch

from flashdraft import hub
from flashdraft.bench.peers import Answer
from flashdraft.types import require

CONTEXT = 4096  # tokens that llama.cpp makes room for


def one_by_one(answer):
    return lambda prompts, params: [
        answer(prompt, one) for prompt, one in zip(prompts, params, strict=True)
    ]


def llama_cpp(path, model):
    """llama.cpp through its C interface: its Python loop would cost it time. path: a GGUF file."""
    import llama_cpp as lib

    threads = torch.get_num_threads()
    llama = lib.Llama(
        path,
        n_ctx=CONTEXT,
        n_batch=CONTEXT,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )
    chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
    lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_greedy())

    def read(tokens):
        held = (c_int32 * len(tokens))(*tokens)  # the batch only points at it
        assert lib.llama_decode(llama.ctx, lib.llama_batch_get_one(held, len(tokens))) == 0
        return int(lib.llama_sampler_sample(chain, llama.ctx, -1))

    def answer(prompt, params):
        length = len(prompt) + params.max_new_tokens
        require(
            length <= CONTEXT,
            "the length of prompt and answer",
            length,
            f"at most {CONTEXT} beside llama.cpp",
        )
        lib.llama_memory_clear(lib.llama_get_memory(llama.ctx), True)
        started = time.perf_counter()
        tokens = [read(prompt)]
        first = time.perf_counter()
        while len(tokens) < params.max_new_tokens and tokens[-1] not in model.eos:
            tokens.append(read(tokens[-1:]))
        llama.detokenize(tokens)
        ended = time.perf_counter()
        return Answer(tuple(tokens), ended - started, ended - first)

    return one_by_one(answer)


def ask(port, path, body=None):
    """(status, answer) of a server on this machine; (0, None) while nobody listens."""
    connection = HTTPConnection("127.0.0.1", port)
    try:
        connection.request(
            "GET" if body is None else "POST", path, None if body is None else json.dumps(body)
        )
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    except ConnectionRefusedError:
        return 0, None
    finally:
        connection.close()


def serve(arguments):
    """The port of a llama-server with these arguments. It answers requests, and ends with this process."""
    binary = os.environ.get("LLAMA_SERVER", "llama-server")
    require(
        shutil.which(binary) is not None,
        "LLAMA_SERVER",
        binary,
        "llama.cpp's server: recipes/llama_cpp_dflash.sh",
    )
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    process = subprocess.Popen([binary, *arguments, "--port", str(port)], stdout=subprocess.DEVNULL)
    atexit.register(process.kill)
    while ask(port, "/health")[0] != 200:
        require(
            process.poll() is None,
            "llama-server's exit status",
            process.returncode,
            "0: its message stands above",
        )
        time.sleep(0.1)
    return port


def llama_server(text, model):
    """llama.cpp's own server, alone or with its own DFlash. text: TARGET.gguf[+DRAFT.gguf[+DRAFTS]].

    DRAFTS: tokens drafted a step, at most the block less one; 3 is llama.cpp's default. The environment's LLAMA_SERVER names the
    binary. Answer.decode_seconds and the counts are the server's; Answer.seconds is ours, with the request's way there and back.
    """
    (path, _, rest), threads = text.partition("+"), str(torch.get_num_threads())
    draft, _, drafts = rest.partition("+")
    options = f"-c {CONTEXT} -b {CONTEXT} -np 1 -t {threads} -tb {threads} --cache-ram 0 --fit off --log-verbosity 1".split()
    if draft:
        drafts = drafts or "3"
        options += [
            "-md",
            draft,
            "--spec-type",
            "draft-dflash",
            "--spec-draft-n-max",
            drafts,
            "-td",
            threads,
            "-tbd",
            threads,
        ]
    port = serve(["-m", path, *options])
    greedy = {
        "temperature": 0,
        "samplers": ["top_k"],
        "top_k": 1,
        "cache_prompt": False,
        "return_tokens": True,
    }

    def answer(prompt, params):
        length = len(prompt) + params.max_new_tokens
        require(
            length <= CONTEXT,
            "the length of prompt and answer",
            length,
            f"at most {CONTEXT} beside llama.cpp",
        )
        started = time.perf_counter()
        status, result = ask(
            port, "/completion", {"prompt": prompt, "n_predict": params.max_new_tokens, **greedy}
        )
        seconds = time.perf_counter() - started
        require(status == 200, "llama-server's answer", result, "a completion")
        tokens, times = tuple(result["tokens"]), result["timings"]
        drafted, accepted = times.get("draft_n", 0), times.get("draft_n_accepted", 0)
        # It does not tell its passes. Each commits its accepted drafts and one token, but an end inside a block drops accepted
        # drafts, and then every pass had drafted in full: of two lower bounds the greater.
        passes = max(len(tokens) - 1 - accepted, -(-drafted // int(drafts)) if draft else 0)
        count = len(tokens) - 1  # the passes' own shares are not told: all alike
        steps = tuple(count * (i + 1) // passes - count * i // passes for i in range(passes))
        figures = {"target_passes": passes, "num_drafted": drafted, "num_accepted": accepted}
        return Answer(tokens, seconds, times["predicted_ms"] / 1000, steps, figures)

    return one_by_one(answer)


def ctranslate2(compute_type, model):
    """CTranslate2, converted from the model's folder. compute_type: float32 or int8."""
    import ctranslate2 as lib

    with tempfile.TemporaryDirectory() as scratch:
        folder = f"{scratch}/converted"
        lib.converters.TransformersConverter(str(hub.resolve(model.target.name))).convert(
            folder, quantization=compute_type
        )
        generator = lib.Generator(
            folder, device="cpu", compute_type=compute_type, intra_threads=torch.get_num_threads()
        )
    ends = [model.tokenizer.convert_ids_to_tokens(token) for token in model.eos]

    def answer(prompt, params):
        times = []
        options = {
            "max_length": params.max_new_tokens,
            "end_token": ends,
            "return_end_token": True,
            "sampling_topk": 1,
        }
        options |= {
            "include_prompt_in_result": False,
            "callback": lambda _: bool(times.append(time.perf_counter())),
        }
        started = time.perf_counter()
        (result,) = generator.generate_batch(
            [model.tokenizer.convert_ids_to_tokens(prompt)], **options
        )
        tokens = tuple(result.sequences_ids[0])
        model.tokenizer.decode(tokens)
        ended = time.perf_counter()
        return Answer(tokens, ended - started, ended - times[0])

    return one_by_one(answer)


def openvino(path, model):
    """OpenVINO GenAI on a GGUF file, with the widths that it chooses for it."""
    import numpy
    import openvino as core
    import openvino_genai as lib

    pipeline = lib.LLMPipeline(path, "CPU", INFERENCE_NUM_THREADS=torch.get_num_threads())

    def answer(prompt, params):
        times = []
        options = {
            "max_new_tokens": params.max_new_tokens,
            "stop_token_ids": set(model.eos),
            "do_sample": False,
        }
        options["streamer"] = lambda _: bool(times.append(time.perf_counter()))
        started = time.perf_counter()
        result = pipeline.generate(core.Tensor(numpy.array([prompt])), **options)
        tokens = tuple(result.tokens[0])
        model.tokenizer.decode(tokens)
        ended = time.perf_counter()
        first = result.perf_metrics.get_ttft().mean / 1000
        return Answer(tokens, ended - started, ended - started - first)

    return one_by_one(answer)
