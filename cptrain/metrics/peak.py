"""What a device could do at best, the 100 % of MFU."""

from __future__ import annotations

import re

# Dense TFLOP/s by the makers' data sheets (half of what they print "with sparsity"): of the tensor cores in bf16 and
# fp16 with fp32 accumulation, and of the plain fp32 units, which is what fp32 matmuls use unless TF32 is switched on.
# The first pattern that matches the name torch.cuda.get_device_name gives wins, so variants stand before their family.
_TFLOPS: tuple[tuple[str, float, float], ...] = (
    (r"GB[23]00", 2500.0, 80.0),
    (r"B[23]00", 2250.0, 75.0),
    (r"H[128]00.*NVL", 835.0, 60.0),
    (r"H[18]00.*PCIe", 756.0, 51.0),
    (r"H[128]00", 989.4, 67.0),  # SXM, and the Grace superchip GH200
    (r"A[18]00", 312.0, 19.5),
    (r"\bA10\b", 125.0, 31.2),
    (r"L40S", 362.05, 91.6),
    (r"\bL40\b", 181.05, 90.5),
    (r"\bL4\b", 121.0, 30.3),
    (r"RTX 4090(?! (D|Laptop))", 165.2, 82.6),
    (r"MI3(00|25)X", 1307.4, 163.4),
)


def peak_flops(device_name: str, dtype: str) -> float | None:
    """FLOP/s that the device is built for in "bfloat16", "float16" or "float32"; None where no such figure is known.

    Also None for CPUs and for MIG slices, whose share of the device their name does not say.
    """
    if "MIG" in device_name:
        return None
    for pattern, half, single in _TFLOPS:
        if re.search(pattern, device_name):
            tflops = {"bfloat16": half, "float16": half, "float32": single}.get(dtype)
            return None if tflops is None else tflops * 1e12
    return None
