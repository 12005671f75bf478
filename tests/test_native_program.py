"""Programs of the native core, and how its functions read their arguments."""

import pytest
import torch

_C = pytest.importorskip("fastgan._C", reason="the native core is not built")

N, C, K, SIDE = 3, 5, 7, 6
LEAKY, EPS, SLOPE = 2, 1e-5, 0.2
CODES = {torch.float32: 0, torch.bfloat16: 1}


class Block:
    """Convolution, batch norm, transposed convolution: its tensors, and the arguments of its three kernels."""

    def __init__(self, dtype, seed):
        gen = torch.Generator().manual_seed(seed)
        self.code = CODES[dtype]
        self.x, self.y = (torch.randn(N, SIDE, SIDE, C, generator=gen).to(dtype) for _ in range(2))
        self.weight = torch.randn(K, C, 3, 3, generator=gen).to(dtype)
        self.gamma, self.beta = (torch.randn(K, generator=gen) for _ in range(2))
        self.bytes = N * SIDE * SIDE * K * self.x.element_size()
        self.scratch = torch.empty(2 * self.bytes + 8 * K, dtype=torch.uint8)

    def kernels(self, x, weight, gamma, beta, y, conv, norm, mean, var):
        """(name, arguments without threads); what is passed stands for the pointers."""
        shape = _C.Conv(N, C, SIDE, SIDE, K, SIDE, SIDE, 3, 3, 1, 1, 1, 1, 1, 1, 1)
        code, strides = self.code, self.weight.stride()
        norms = N, K, SIDE * SIDE, 1, True, True, EPS, LEAKY, SLOPE
        return [
            ("conv2d", (shape, code, x, weight, code, strides, None, conv, 0, 0.0)),
            ("bn_act_forward", (code, conv, gamma, beta, mean, var, norm, *norms)),
            ("conv_transpose2d", (shape, code, norm, weight, code, strides, None, y, 0, 0.0)),
        ]

    def tensors(self):
        return self.x, self.weight, self.gamma, self.beta, self.y

    def scratch_places(self, base):
        """conv, norm, mean and var within the scratch tensor, each as base(bytes behind its start)."""
        return [base(at) for at in (0, self.bytes, 2 * self.bytes, 2 * self.bytes + 4 * K)]

    def one_by_one(self, threads):
        places = self.scratch_places(lambda at: self.scratch.data_ptr() + at)
        for name, arguments in self.kernels(*self.tensors(), *places):
            getattr(_C, name)(*arguments, threads)
        return self.y.clone(), self.scratch.clone()

    def program(self):
        program = _C.Program()
        for name, arguments in self.kernels(0, 1, 2, 3, 4, *self.scratch_places(lambda at: (5, at))):
            program.append(name, *arguments)
        return program


@pytest.mark.parametrize("dtype", CODES)
def test_a_program_is_its_kernels_one_by_one(dtype):
    """Bit for bit, whatever the addresses and the threads of a call."""
    program = Block(dtype, 0).program()
    for seed in (1, 2):
        for threads in (1, 2):
            block = Block(dtype, seed)
            want = block.one_by_one(threads)
            block.y.fill_(torch.nan)
            block.scratch.fill_(255)
            program.run(threads, *block.tensors(), block.scratch)
            assert torch.equal(block.y, want[0]) and torch.equal(block.scratch, want[1])
            addresses = [t.data_ptr() for t in (*block.tensors(), block.scratch)]
            block.y.fill_(torch.nan)
            program.run(threads, *addresses)
            assert torch.equal(block.y, want[0])


def test_an_absent_pointer_stays_absent():
    """None when a step is appended, and None for a slot when the program runs."""
    x, y = torch.tensor([[-1.0, 2.0]]), torch.empty(1, 2)
    shape = 1, 2, 1, True, LEAKY, SLOPE, 1.0, -1.0
    program = _C.Program()
    program.append("bias_act_forward", 0, 0, 1, 2, *shape)
    program.run(1, x, None, y)
    assert y.tolist() == [[pytest.approx(-0.2), 2.0]]
    program.run(1, x, torch.tensor([1.0, 1.0]), y)
    assert y.tolist() == [[0.0, 3.0]]
    without = _C.Program()
    without.append("bias_act_forward", 0, 0, None, 1, *shape)
    without.run(1, x, y)
    assert y.tolist() == [[pytest.approx(-0.2), 2.0]]


def test_refusals():
    program = _C.Program()
    shape = 1, 2, 1, True, LEAKY, SLOPE, 1.0, -1.0
    with pytest.raises(ValueError, match="got conv3d"):
        program.append("conv3d", 0)
    with pytest.raises(TypeError, match="bias_act_forward takes 12 arguments, got 13: dtype, x, bias, y, N"):
        program.append("bias_act_forward", 0, 0, 1, 2, *shape, 1)
    with pytest.raises(ValueError, match=r"act must be in 0\.\.10, got 11"):
        program.append("bias_act_forward", 0, 0, 1, 2, 1, 2, 1, True, 11, SLOPE, 1.0, -1.0)
    with pytest.raises(ValueError, match="adam cannot be a step"):
        program.append("adam", [], None, 0.1, 0.5, 0.9, -0.7, -0.1, 1e-8, 0.0, False, False, 0.0)
    with pytest.raises(ValueError, match="must not be negative"):
        program.append("bias_act_forward", 0, 0, 1, 2, -1, 2, 1, True, LEAKY, SLOPE, 1.0, -1.0)
    program.append("bias_act_forward", 0, 0, 1, 2, *shape)
    with pytest.raises(ValueError, match="each of its 3 slots, got 2"):
        program.run(1, 0, 0)
    with pytest.raises(ValueError, match="threads must be in 1"):
        program.run(0, 0, 0, 0)
    with pytest.raises(TypeError, match="x must be a tensor, an address or None, got str"):
        _C.bias_act_forward(0, "x", 0, 0, *shape, 1)
    with pytest.raises(TypeError, match="slope must be a number, got str"):
        _C.bias_act_forward(0, 0, 0, 0, *shape[:-3], "0.2", 1.0, -1.0, 1)
    with pytest.raises(TypeError, match=r"conv must be what Conv\(...\) gives, got tuple"):
        _C.conv2d((1,) * 16, 0, 0, 0, 0, (1, 1, 1, 1), 0, 0, 0, 0.0, 1)
    with pytest.raises(ValueError, match="groups must divide both channel counts, got C=5, K=4, groups=2"):
        _C.Conv(1, 5, 4, 4, 4, 4, 4, 1, 1, 1, 1, 0, 0, 1, 1, 2)
    with pytest.raises(ValueError, match="strides, dilations and groups must be in 1"):
        _C.Conv(1, 4, 4, 4, 4, 4, 4, 1, 1, 0, 1, 0, 0, 1, 1, 1)
