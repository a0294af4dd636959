"""The same weights in another GGUF format, so that llama.cpp can be timed on them: gguf_like.py IN.gguf OUT.gguf F32|Q8_0.

Metadata and tokenizer are copied; norms stay float32. From Q4_1 to F32 nothing is rounded.
"""

import sys
from pathlib import Path

import gguf
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize, quantize

from flashdraft.files import appears_whole, output_file

source, kind = GGUFReader(sys.argv[1]), gguf.GGMLQuantizationType[sys.argv[3]]
out = output_file(Path(sys.argv[2]), inputs=[Path(sys.argv[1])])
if out.exists() and out.stat().st_size:
    sys.exit(f"`{out}` exists: name another file, or remove it")
with appears_whole(out) as made:
    writer = GGUFWriter(made, source.fields["general.architecture"].contents())
    for field in source.fields.values():
        if field.name.startswith("GGUF.") or field.name in (
            "general.architecture",
            "general.file_type",
        ):
            continue
        inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    writer.add_file_type(
        gguf.LlamaFileType[{"F32": "ALL_F32"}.get(kind.name, f"MOSTLY_{kind.name}")]
    )  # OpenVINO reads it
    for tensor in source.tensors:
        plain = dequantize(tensor.data, tensor.tensor_type)
        if len(tensor.shape) == 1 or kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(tensor.name, plain.astype("float32"))
        else:
            writer.add_tensor(tensor.name, quantize(plain, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
