"""Makes the files next to it with the `gguf` package, the format's other implementation: pip install gguf."""

from pathlib import Path

import numpy as np
from gguf import GGUFWriter, GGMLQuantizationType


def fill(writer: GGUFWriter) -> None:
    writer.add_name("by gguf-py")
    writer.add_uint8("a.u8", 200)
    writer.add_int16("a.i16", -300)
    writer.add_float64("a.f64", 1e-300)
    writer.add_bool("a.bool", True)
    writer.add_array("a.floats", [0.5, -2.0])
    writer.add_array("a.strings", ["Ġthe", "", "🦀"])
    writer.add_tensor("f32", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("f16", np.arange(4, dtype=np.float16))
    q8_0 = np.arange(2 * 34, dtype=np.uint8).reshape(2, 34)
    writer.add_tensor("q8_0", q8_0, raw_dtype=GGMLQuantizationType.Q8_0)


def write(path: Path, **options) -> None:
    writer = GGUFWriter(path, "qwen3", **options)
    fill(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


here = Path(__file__).parent
write(here / "whole.gguf")
write(here / "split.gguf", split_max_tensors=1)
