"""Run train.py and write what this rank's tensors take at most in each phase, in bytes, to the file in
MEMORY.

    MEMORY=peaks.json python tests/memory.py --model=... --data=... --out=...   # train.py's flags

After every operation it adds up the storages that are alive, those that FSDP resizes to nothing as
nothing.
"""
import json
import os
import runpy
import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import dataset  # noqa: E402
import model  # noqa: E402


class Held(TorchDispatchMode):
    """most: phase -> the most bytes that were held after any of its operations."""

    def __init__(self):
        super().__init__()
        self.phase, self.storages, self.most = "reading", {}, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, out)):
            tensor = getattr(tensor, "_local_tensor", tensor)  # of a DTensor
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                self.storages.setdefault(storage._cdata, StorageWeakRef(storage))
        self.most[self.phase] = max(self.most.get(self.phase, 0), self.held())
        return out

    def held(self):
        total = 0
        for pointer, reference in list(self.storages.items()):
            storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            if storage is None:
                del self.storages[pointer]
            else:
                total += storage.nbytes()
        return total

    def begins(self, phase, owner, name, after=False):
        """The phase begins when this function is called, or has returned."""
        function = getattr(owner, name)

        def marked(*args, **kwargs):
            self.phase = self.phase if after else phase
            result = function(*args, **kwargs)
            self.phase = phase
            return result
        setattr(owner, name, marked)


if __name__ == "__main__":
    mode = Held()
    mode.begins("load", model, "shard")
    mode.begins("reference pass", dataset, "all_logps")
    mode.begins("training", torch.optim.AdamW, "__init__")
    mode.begins("resume state", dcp, "save")
    mode.begins("trained model", dcp, "save", after=True)
    with mode:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    file = Path(os.environ["MEMORY"].format(rank=os.environ.get("RANK", 0)))
    file.write_text(json.dumps(mode.most))
