"""The same weights in another GGUF format, so that llama.cpp can be timed on them.

    python recipes/gguf_like.py IN.gguf OUT.gguf F32|Q8_0

Metadata and tokenizer are copied; norms stay float32. From Q4_1 to F32 nothing is rounded.
"""

import sys
from pathlib import Path

import gguf
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize, quantize

from flashdraft.files import appears_whole, output_file

WRITTEN_ANEW = ("general.architecture", "general.file_type")


def file_type(kind):
    """As OpenVINO reads it."""
    name = "ALL_F32" if kind.name == "F32" else f"MOSTLY_{kind.name}"
    return gguf.LlamaFileType[name]


def copy_metadata(source, writer):
    for field in source.fields.values():
        if field.name.startswith("GGUF.") or field.name in WRITTEN_ANEW:
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)


def add_tensors(source, writer, kind):
    for tensor in source.tensors:
        plain = dequantize(tensor.data, tensor.tensor_type)
        is_norm = len(tensor.shape) == 1
        if is_norm or kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(tensor.name, plain.astype("float32"))
        else:
            writer.add_tensor(tensor.name, quantize(plain, kind), raw_dtype=kind)


source = GGUFReader(sys.argv[1])
kind = gguf.GGMLQuantizationType[sys.argv[3]]
out = output_file(Path(sys.argv[2]), inputs=[Path(sys.argv[1])])
if out.exists() and out.stat().st_size:
    sys.exit(f"`{out}` exists: name another file, or remove it")

with appears_whole(out) as made:
    writer = GGUFWriter(made, source.fields["general.architecture"].contents())
    copy_metadata(source, writer)
    writer.add_file_type(file_type(kind))
    add_tensors(source, writer, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
