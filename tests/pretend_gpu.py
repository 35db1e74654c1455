"""A GPU rehearsed on a machine without one. In `pretend_gpu` the project's device is cuda:0. All tensors stay
on the CPU and have their true values; the storages of those that a GPU would hold carry a mark.

    with pretend_gpu() as gpu:
        call("train.py", ...)
    print(gpu.waits)

Raises an error where CUDA would: for an operation on tensors of two devices, by torch's own list of the
operations that check for it, and for a GPU's tensor that is read as a numpy array. Counts where the host
waits for the GPU. It knows nothing of kernels, memory, NCCL and other processes; its autocast is the CPU's.
"""
import collections
import contextlib
import functools
import re
import sys
from pathlib import Path

import pytest
import torch
import torchgen
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model
from conftest import ROOT

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def on_gpu(tensor):
    return getattr(tensor.untyped_storage(), "on_gpu", False)


def tensors_in(values):
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def mark(values):
    for tensor in tensors_in(values):
        tensor.untyped_storage().on_gpu = True


@functools.cache
def checked_operations():
    """The names of the operations whose CUDA kernels refuse any tensor of another device."""
    path = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    found = {"aten::stack"}  # made of aten::cat
    for entry in path.read_text().split("\n- func: ")[1:]:
        has_kernel = re.search(r"^ +[\w, ]*\bCUDA\b[\w, ]*:|^  structured", entry, re.MULTILINE)
        if has_kernel and "device_check: NoCheck" not in entry:
            found.add("aten::" + entry.partition("(")[0])
    return found


class Operations(TorchDispatchMode):
    """Sees every operation of torch's C++ library, also in backward passes and optimizers."""

    COPIES = "aten::copy_", "aten::_foreach_copy_"
    INDEXING = ("aten::index", "aten::_unsafe_index", "aten::index_put", "aten::index_put_",
                "aten::_index_put_impl_")
    # what is read as a number, or whose result has a size that only the GPU knows
    READS = ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select",
             "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::repeat_interleave",
             "aten::bincount")

    def __init__(self, calls):
        super().__init__()
        self.calls, self.checked = calls, checked_operations()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = tensors_in((args, kwargs))
        of_gpu = any(map(on_gpu, given)) or (not given and self.calls.of_gpu)
        if of_gpu:
            self.check(func, args, kwargs)
            if self.reads(func, args):
                self.calls.wait()
        out = func(*args, **kwargs)
        if of_gpu and not func._schema.is_mutable:
            mark(out)
        if of_gpu and not func.is_view:
            self.calls.queued = func._schema.name not in self.READS
        return out

    def check(self, func, args, kwargs):
        name = func._schema.name
        if name in self.COPIES:
            return
        if name in self.INDEXING:
            args = args[:1] + args[2:]  # the indices may be the CPU's
        strict = func.name() in self.checked
        for tensor in tensors_in((args, kwargs)):
            if not on_gpu(tensor) and (strict or tensor.dim() > 0):
                raise RuntimeError(f"{func.name()}: expected all tensors to be on the same device, but one, "
                                   f"of shape {tuple(tensor.shape)}, is on the CPU, and others on cuda:0")
        if func._schema.is_mutable and not all(map(on_gpu, tensors_in(args[0]))):
            raise RuntimeError(f"{func.name()}: the result goes to the CPU, but comes from cuda:0")

    def reads(self, func, args):
        if func._schema.name in self.INDEXING:  # by a mask: how many? by the CPU's indices: they are copied
            return any(index.dtype == torch.bool or not on_gpu(index) for index in tensors_in(args[1]))
        return func._schema.name in self.READS


class Calls(TorchFunctionMode):
    """Sees every call of torch from Python: to which device a script moves a tensor, and on which it is.
    (In a backward pass torch has no such modes.)

    waits: place -> how often the host waited there for the GPU. Waits with nothing launched between them are
    one. A copy to the GPU waits, too, as the CPU's memory is not pinned.
    """

    def __init__(self):
        super().__init__()
        self.waits = collections.Counter()
        self.queued = False  # whether the GPU has work that nobody has waited for
        self.of_gpu = False  # whether the call in hand is, and so what it makes out of nothing

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in self.OTHERWISE and on_gpu(args[0]):
            return self.OTHERWISE[func](self, *args, **kwargs)
        if func in self.MOVES:
            return self.MOVES[func](self, *args, **kwargs)
        if func is torch._C._nn._parse_to:  # it only reads its arguments
            return func(*args, **kwargs)
        to_gpu = is_gpu(kwargs.get("device"))
        if to_gpu:
            kwargs["device"] = CPU
        with self.called(to_gpu or any(map(on_gpu, tensors_in((args, kwargs))))):
            out = func(*args, **kwargs)
        if to_gpu:
            if func in (torch.tensor, torch.as_tensor):  # made on the CPU, and copied
                self.wait()
            else:
                self.queued = True
            mark(out)
        return out

    @contextlib.contextmanager
    def called(self, of_gpu):
        before, self.of_gpu = self.of_gpu, of_gpu
        try:
            yield
        finally:
            self.of_gpu = before

    def wait(self):
        if self.queued:
            self.waits[place()] += 1
        self.queued = False

    def to(self, tensor, *args, copy=False, **kwargs):
        if args and isinstance(args[0], torch.Tensor):
            args = GPU if on_gpu(args[0]) else CPU, args[0].dtype
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        dtype = dtype or tensor.dtype
        if device and device.type == "meta":
            return tensor.to(device, dtype)
        if device is None or is_gpu(device) == on_gpu(tensor):
            return tensor.to(dtype, copy=copy)
        self.wait()
        moved = tensor.detach().to(dtype, copy=True)
        moved.untyped_storage().on_gpu = is_gpu(device)
        self.queued = False
        return moved

    def tolist(self, tensor):
        self.wait()
        return tensor.tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")

    MOVES = {torch.Tensor.to: to, torch.Tensor.cpu: lambda self, tensor: self.to(tensor, CPU),
             torch.Tensor.cuda: lambda self, tensor: self.to(tensor, GPU)}
    OTHERWISE = {
        torch.Tensor.device.__get__: lambda self, tensor: GPU,
        torch.Tensor.is_cuda.__get__: lambda self, tensor: True,
        torch.Tensor.is_cpu.__get__: lambda self, tensor: False,
        torch.Tensor.numpy: numpy, torch.Tensor.__array__: numpy,
        torch.Tensor.tolist: tolist}


def is_gpu(device):
    return device is not None and torch.device(device).type == "cuda"


def place():
    """The innermost function that is the project's: its name, whatever file it is in."""
    frame = sys._getframe()
    while frame and Path(frame.f_code.co_filename).parent not in (ROOT, ROOT / "examples"):
        frame = frame.f_back
    return frame.f_code.co_name if frame else "elsewhere"


GROUP = torch._C._group_tensors_by_device_and_dtype


def grouped(tensors, *args):
    """As torch's own, which looks at the device from C++; for optimizers and gradient norms."""
    assert len({on_gpu(tensor) for tensor in tensors_in(tensors[0])}) == 1
    device = GPU if on_gpu(tensors[0][0]) else CPU
    return {(device, dtype): group for (_, dtype), group in GROUP(tensors, *args).items()}


@contextlib.contextmanager
def pretend_gpu():
    autocast = torch.autocast
    calls = Calls()
    with pytest.MonkeyPatch.context() as patch, calls, Operations(calls):
        # its code, so also where it is imported already
        patch.setattr(model.get_device, "__code__", (lambda: torch.device("cuda", 0)).__code__)
        patch.setattr(torch, "autocast", lambda device, *args, **kwargs: autocast("cpu", *args, **kwargs))
        patch.setattr(torch._C, "_group_tensors_by_device_and_dtype", grouped)
        patch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
        yield calls
