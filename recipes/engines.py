"""Other CPU engines for `flashdraft bench`, on the same weights and threads, greedy, from token ids to text.

    flashdraft bench ... --methods "dflash,Q8_0=recipes/engines.py:llama_cpp:q8_0.gguf,CT2=recipes/engines.py:ctranslate2:int8"

A function gets the text behind its name and our Model, and returns what answers a list of prompts; yours may stand in a file
of your own. pip install llama-cpp-python ctranslate2 openvino-genai, or some of them.
"""

import tempfile
import time
from ctypes import c_int32

import torch

from flashdraft import hub
from flashdraft.bench.peers import Answer
from flashdraft.types import require

CONTEXT = 4096  # tokens that llama.cpp makes room for


def one_by_one(answer):
    return lambda prompts, params: [answer(prompt, one) for prompt, one in zip(prompts, params, strict=True)]


def llama_cpp(path, model):
    """llama.cpp through its C interface: its Python loop would cost it time. path: a GGUF file."""
    import llama_cpp as lib

    threads = torch.get_num_threads()
    llama = lib.Llama(path, n_ctx=CONTEXT, n_batch=CONTEXT, n_threads=threads, n_threads_batch=threads, verbose=False)
    chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
    lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_greedy())

    def read(tokens):
        held = (c_int32 * len(tokens))(*tokens)  # the batch only points at it
        assert lib.llama_decode(llama.ctx, lib.llama_batch_get_one(held, len(tokens))) == 0
        return int(lib.llama_sampler_sample(chain, llama.ctx, -1))

    def answer(prompt, params):
        length = len(prompt) + params.max_new_tokens
        require(length <= CONTEXT, "the length of prompt and answer", length, f"at most {CONTEXT} beside llama.cpp")
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


def ctranslate2(compute_type, model):
    """CTranslate2, converted from the model's folder. compute_type: float32 or int8."""
    import ctranslate2 as lib

    with tempfile.TemporaryDirectory() as scratch:
        folder = f"{scratch}/converted"
        lib.converters.TransformersConverter(str(hub.resolve(model.target.name))).convert(folder, quantization=compute_type)
        generator = lib.Generator(folder, device="cpu", compute_type=compute_type, intra_threads=torch.get_num_threads())
    ends = [model.tokenizer.convert_ids_to_tokens(token) for token in model.eos]

    def answer(prompt, params):
        times = []
        options = {"max_length": params.max_new_tokens, "end_token": ends, "return_end_token": True, "sampling_topk": 1}
        options |= {"include_prompt_in_result": False, "callback": lambda _: bool(times.append(time.perf_counter()))}
        started = time.perf_counter()
        (result,) = generator.generate_batch([model.tokenizer.convert_ids_to_tokens(prompt)], **options)
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
        options = {"max_new_tokens": params.max_new_tokens, "stop_token_ids": set(model.eos), "do_sample": False}
        options["streamer"] = lambda _: bool(times.append(time.perf_counter()))
        started = time.perf_counter()
        result = pipeline.generate(core.Tensor(numpy.array([prompt])), **options)
        tokens = tuple(result.tokens[0])
        model.tokenizer.decode(tokens)
        ended = time.perf_counter()
        first = result.perf_metrics.get_ttft().mean / 1000
        return Answer(tokens, ended - started, ended - started - first)

    return one_by_one(answer)
