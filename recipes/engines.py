"""Other CPU engines for `flashdraft bench`, on the same weights and threads, greedy.

    flashdraft bench ... --methods "dflash,Q8_0=recipes/engines.py:llama_cpp:q8_0.gguf"
    flashdraft bench ... --methods "dflash,CT2=recipes/engines.py:ctranslate2:int8"

A function gets the text behind its name and our Model, and returns what answers a list of prompts,
from token ids to text; yours may stand in a file of your own.
pip install llama-cpp-python ctranslate2 openvino-genai, or some of them; llama_server wants a
server that recipes/llama_cpp_dflash.sh builds.
"""

import atexit
import json
import math
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
    def method(prompts, params):
        pairs = zip(prompts, params, strict=True)
        return [answer(prompt, own) for prompt, own in pairs]

    return method


def check_length(prompt, params):
    length = len(prompt) + params.max_new_tokens
    allowed = f"at most {CONTEXT} beside llama.cpp"
    require(length <= CONTEXT, "the length of prompt and answer", length, allowed)


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
        """The token behind these."""
        held = (c_int32 * len(tokens))(*tokens)  # the batch only points at it
        batch = lib.llama_batch_get_one(held, len(tokens))
        assert lib.llama_decode(llama.ctx, batch) == 0
        return int(lib.llama_sampler_sample(chain, llama.ctx, -1))

    def answer(prompt, params):
        check_length(prompt, params)
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


# --- llama.cpp's server -------------------------------------------------------------------------


def ask(port, path, body=None):
    """(status, answer) of a server on this machine; (0, None) while nobody listens."""
    connection = HTTPConnection("127.0.0.1", port)
    try:
        if body is None:
            connection.request("GET", path)
        else:
            connection.request("POST", path, json.dumps(body))
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    except ConnectionRefusedError:
        return 0, None
    finally:
        connection.close()


def free_port():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return unused.getsockname()[1]


def serve(arguments):
    """The port of a llama-server with these arguments.

    It answers requests, and ends with this process.
    """
    binary = os.environ.get("LLAMA_SERVER", "llama-server")
    is_there = shutil.which(binary) is not None
    hint = "llama.cpp's server: recipes/llama_cpp_dflash.sh"
    require(is_there, "LLAMA_SERVER", binary, hint)

    port = free_port()
    process = subprocess.Popen([binary, *arguments, "--port", str(port)], stdout=subprocess.DEVNULL)
    atexit.register(process.kill)
    while True:
        status, _ = ask(port, "/health")
        if status == 200:
            return port
        is_running = process.poll() is None
        hint = "0: its message stands above"
        require(is_running, "llama-server's exit status", process.returncode, hint)
        time.sleep(0.1)


def server_arguments(path, draft, drafts, kind):
    threads = str(torch.get_num_threads())
    room = str(CONTEXT)
    arguments = ["-m", path, "-c", room, "-b", room, "-np", "1", "-t", threads, "-tb", threads]
    arguments += ["--cache-ram", "0", "--fit", "off", "--log-verbosity", "1"]
    if draft:
        arguments += ["-md", draft, "--spec-type", kind, "--spec-draft-n-max", drafts]
        arguments += ["-td", threads, "-tbd", threads]
    return arguments


def steps_of(num_tokens, passes):
    """Tokens of every pass: each one's own share is not told, so they are spread evenly."""
    steps = []
    for i in range(passes):
        before = num_tokens * i // passes
        behind = num_tokens * (i + 1) // passes
        steps.append(behind - before)
    return tuple(steps)


def llama_server(text, model):
    """llama.cpp's own server, alone or with a drafter that `flashdraft export` wrote.

    text: TARGET.gguf[+DRAFT.gguf[+DRAFTS[+KIND]]]. DRAFTS: tokens drafted a step, at most as many
    as the drafter was trained for; 3 is llama.cpp's default. KIND: draft-dflash or draft-dspark, as
    the export says. The environment's LLAMA_SERVER names the binary.
    Answer.decode_seconds and the counts are the server's; Answer.seconds is ours, with the
    request's way there and back.
    """
    path, _, rest = text.partition("+")
    draft, _, rest = rest.partition("+")
    drafts, _, kind = rest.partition("+")
    if draft and not drafts:
        drafts = "3"
    port = serve(server_arguments(path, draft, drafts, kind or "draft-dflash"))

    def answer(prompt, params):
        check_length(prompt, params)
        body = {
            "prompt": prompt,
            "n_predict": params.max_new_tokens,
            "temperature": 0,
            "samplers": ["top_k"],
            "top_k": 1,
            "cache_prompt": False,
            "return_tokens": True,
        }
        started = time.perf_counter()
        status, result = ask(port, "/completion", body)
        seconds = time.perf_counter() - started
        require(status == 200, "llama-server's answer", result, "a completion")

        tokens = tuple(result["tokens"])
        times = result["timings"]
        drafted = times.get("draft_n", 0)
        accepted = times.get("draft_n_accepted", 0)
        # It does not tell its passes. Each commits its accepted drafts and one token, but an end
        # inside a block drops accepted drafts, and then every pass had drafted in full: of two
        # lower bounds the greater.
        count = len(tokens) - 1  # behind the first token
        full_passes = math.ceil(drafted / int(drafts)) if draft else 0
        passes = max(count - accepted, full_passes)
        figures = {"target_passes": passes, "num_drafted": drafted, "num_accepted": accepted}
        decode_seconds = times["predicted_ms"] / 1000
        return Answer(tokens, seconds, decode_seconds, steps_of(count, passes), figures)

    return one_by_one(answer)


# --- others -------------------------------------------------------------------------------------


def ctranslate2(compute_type, model):
    """CTranslate2, converted from the model's folder. compute_type: float32 or int8."""
    import ctranslate2 as lib

    threads = torch.get_num_threads()
    source = str(hub.resolve(model.target.name))
    with tempfile.TemporaryDirectory() as scratch:
        folder = f"{scratch}/converted"
        lib.converters.TransformersConverter(source).convert(folder, quantization=compute_type)
        generator = lib.Generator(
            folder, device="cpu", compute_type=compute_type, intra_threads=threads
        )
    ends = [model.tokenizer.convert_ids_to_tokens(token) for token in model.eos]

    def answer(prompt, params):
        times = []

        def note_time(_):
            times.append(time.perf_counter())
            return False  # go on

        started = time.perf_counter()
        (result,) = generator.generate_batch(
            [model.tokenizer.convert_ids_to_tokens(prompt)],
            max_length=params.max_new_tokens,
            end_token=ends,
            return_end_token=True,
            sampling_topk=1,
            include_prompt_in_result=False,
            callback=note_time,
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
        started = time.perf_counter()
        result = pipeline.generate(
            core.Tensor(numpy.array([prompt])),
            max_new_tokens=params.max_new_tokens,
            stop_token_ids=set(model.eos),
            do_sample=False,
            streamer=lambda _: False,  # go on
        )
        tokens = tuple(result.tokens[0])
        model.tokenizer.decode(tokens)
        ended = time.perf_counter()
        first = result.perf_metrics.get_ttft().mean / 1000
        return Answer(tokens, ended - started, ended - started - first)

    return one_by_one(answer)
