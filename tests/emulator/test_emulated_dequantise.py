"""The dequantising kernels of csrc/cuda on the emulator, against their formula in float64."""

import pytest
import torch

from tests.emulator.launchers import DTYPES, Read, Write

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def close(ours, truth):
    torch.testing.assert_close(ours.double(), truth, rtol=torch.finfo(ours.dtype).eps + 2e-7, atol=1e-7)


def part(x, offset):
    """x in memory of its own that begins `offset` elements behind an aligned address."""
    whole = torch.empty(x.numel() + offset, dtype=x.dtype)
    whole[offset:] = x.flatten()
    return whole[offset:].view(x.shape)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("first", "count", "offset"), [(0, 1, 0), (0, 7, 0), (8, 4100, 0), (64, 4096, 1), (2, 1027, 0), (0, 2048, 3)]
)
def test_four_bits(emulator, first, count, offset, dtype, double):
    """Tiles that begin and end anywhere, on packed weights and outputs that are aligned or not."""
    emulator.order(offset)
    block, absmax_block = 64, 16
    elements = first + count
    blocks = -(-elements // block)
    packed = part(torch.randint(0, 256, (-(-elements // 2),), dtype=torch.uint8), offset)
    code = torch.randn(16)
    out = part(torch.empty(count, dtype=dtype), offset)
    if double:
        absmax8 = torch.randint(0, 256, (blocks,), dtype=torch.uint8)
        absmax_code, absmax_scale = torch.randn(256), torch.rand(-(-blocks // absmax_block))
        absmax = absmax_code[absmax8.long()] * absmax_scale.repeat_interleave(absmax_block)[:blocks] + 0.25
        scales = {"absmax8": Read(absmax8), "absmax_code": Read(absmax_code), "absmax_scale": Read(absmax_scale),
                  "absmax_block": absmax_block, "absmax_offset": 0.25}  # fmt: skip
    else:
        absmax = torch.rand(blocks)
        scales = {"absmax": Read(absmax)}
    emulator.launch("dequantise_4bit", packed=Read(packed), code=Read(code), out=Write(out), first=first, count=count,
                    block=block, dtype=DTYPES[dtype], **scales)  # fmt: skip
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten()[first:elements]
    close(out, code[codes.long()].double() * absmax.double().repeat_interleave(block)[first:elements])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("rows", "K"), [(1, 1), (3, 8), (5, 70), (2, 2048), (2, 2056), (3, 2049)])
def test_eight_bits(emulator, rows, K, dtype):
    emulator.order(rows)
    values, scale = torch.randint(-128, 128, (rows, K), dtype=torch.int8), torch.rand(rows)
    out = torch.empty(rows, K, dtype=dtype)
    emulator.launch("dequantise_8bit", values=Read(values), scale=Read(scale), out=Write(out), rows=rows, K=K,
                    dtype=DTYPES[dtype])  # fmt: skip
    close(out, values.double() * scale.double()[:, None])


def test_more_rows_than_a_grid_has_in_y(emulator):
    rows = 65537
    values, scale = torch.randint(-128, 128, (rows, 1), dtype=torch.int8), torch.rand(rows)
    out = torch.empty(rows, 1)
    emulator.launch("dequantise_8bit", values=Read(values), scale=Read(scale), out=Write(out), rows=rows, K=1,
                    dtype=DTYPES[torch.float32])  # fmt: skip
    close(out, values.double() * scale.double()[:, None])
