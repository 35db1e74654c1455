"""Models: load and save a causal LM and its tokenizer, compute log pi(y|x), shard a model over processes, and
save and load the state that a run resumes from. Text becomes token ids in tokens.py.

    python -c 'from model import *; print(load_model("MODEL", torch.float32, get_device()).num_parameters())'
"""
import contextlib
import ctypes
import datetime
import functools
import hashlib
import math
import os
import platform
import shutil
import sys
import warnings
from pathlib import Path

import huggingface_hub
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict, get_state_dict,
                                                     set_model_state_dict, set_state_dict)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import rows

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
# dcp says so on every save of a single process
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")


# ---- device and dtype ----

def get_device():
    """This process's own GPU under torchrun, the first GPU, or the CPU."""
    if not torch.cuda.is_available():
        if torch.version.cuda and Path("/dev/nvidia0").exists():
            rows.fail(f"this machine has a GPU, but torch {torch.__version__} cannot use it: most likely "
                      f"its driver is older than CUDA {torch.version.cuda} needs. Update the driver, or "
                      "install a torch for an older CUDA; to run on the CPU, install torch's CPU build")
        return torch.device("cpu")
    # cuDNN's attention prepares a plan for every new shape, which takes longer than the attention itself: the
    # sampler has a new length in every step, and most micro-batches are of a new shape
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cuda", torch.cuda.current_device())


def start_processes(device):
    """Join the processes that torchrun started, if any (gloo on CPUs, NCCL on GPUs); return (rank, world)."""
    rank, world = rows.rank_and_world()
    if "RANK" in os.environ:  # also for one process, which --shard may have
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(minutes=30))
    return rank, world


def barrier():
    """Wait for all processes, on the CPU: for hours, if need be, while one reads the data or saves."""
    if dist.is_initialized():
        dist.barrier(timeout=datetime.timedelta(hours=12))


def any_rank(flag):
    """Whether the flag is true in any process."""
    if not dist.is_initialized():
        return flag
    flag = torch.tensor(float(flag))  # on the CPU: waits for no GPU
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return flag.item() > 0


def get_dtype(name, device):
    """--dtype as a torch.dtype; auto is bfloat16 on a GPU and float32 on a CPU."""
    if name != "auto":
        return getattr(torch, name)
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def sampling_dtype(name, device, config):
    """As `get_dtype`, but auto is also bfloat16 for a model that is stored in it, on a CPU that
    multiplies it in hardware: sampling is bound by reading the weights.
    """
    stored = config.get_text_config().dtype
    if name == "auto" and stored == torch.bfloat16 and torch.cpu.get_capabilities().get("avx512_bf16"):
        return torch.bfloat16
    return get_dtype(name, device)


def keep_freed_memory(device):
    """On a CPU: let glibc keep what is freed. Every step needs the same large tensors, and to get them
    from the kernel page by page again takes 12 to 18% of a step
    (https://man7.org/linux/man-pages/man3/mallopt.3.html).
    """
    if device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2 ** 31 - 1)


# ---- loading ----

def load(kind, path, **kwargs):
    """kind.from_pretrained(path), with an error in one line. kind: a transformers Auto class."""
    refuse_adapter(path)
    try:
        return kind.from_pretrained(path, **kwargs)
    except Exception as error:  # of a missing or broken file, or whatever the code of a model raises
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        what = kind.__name__.replace("AutoModelFor", "").replace("Auto", "")
        rows.fail(f"{path}: no {what} can be loaded from it ({reason}); give a complete Hugging Face folder "
                  "(after `git lfs pull`, if it is a clone), or a hub name that this machine can reach")


def refuse_adapter(path):
    """An adapter's folder, too, loads as a model: the one that it adapts."""
    if Path(path, "adapter_config.json").exists():
        rows.fail(f"{path}: is the folder of an adapter; merge it into its model (peft's merge_and_unload) "
                  "and give that folder. A run of train.py --lora holds the merged model itself")


def load_config(path, trust_remote_code=False):
    """The configuration of a model, in which every probability of dropout is 0. Evaluation mode alone would
    not do: layers that recompute their activations must be in training mode (`checkpoint_activations`).
    """
    config = load(transformers.AutoConfig, path, trust_remote_code=trust_remote_code)
    for part in (config, *vars(config).values()):  # a multimodal model has one for each of its parts
        if isinstance(part, transformers.PretrainedConfig):
            for name, value in vars(part).items():
                if isinstance(value, float) and "drop" in name:
                    setattr(part, name, 0.0)
    return config


# What restores the weights of a checkpoint that was quantised by this method. Other methods lose what
# training needs, or need a program of their own.
DEQUANTIZE = {"mxfp4": transformers.Mxfp4Config, "fp8": transformers.FineGrainedFP8Config}


def dequantization(path, config):
    """The arguments of from_pretrained with which a quantised checkpoint loads as plain weights."""
    quantization = getattr(config, "quantization_config", None)
    if not quantization:
        return {}
    if not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    method = quantization.get("quant_method")
    if method not in DEQUANTIZE:
        rows.fail(f"{path}: is quantised ({method}), and such weights cannot be trained; give the model that "
                  "it was made from")
    return {"quantization_config": DEQUANTIZE[method](dequantize=True)}


def load_tokenizer(path, trust_remote_code=False, template_args=None):
    """template_args: what its chat template gets besides the messages, such as {"enable_thinking": False}."""
    tokenizer = load(transformers.AutoTokenizer, path, trust_remote_code=trust_remote_code)
    with contextlib.suppress(OSError, ValueError):  # it has no tokenizer.json
        own = transformers.PreTrainedTokenizerFast.from_pretrained(path)
        if tokenizer.is_fast and splitting(tokenizer) != splitting(own):
            # transformers 5 makes those of some classes anew
            rows.say_once(f"{path}: transformers {transformers.__version__} would split text as any "
                          f"{type(tokenizer).__name__} does, and not as its tokenizer.json says, which is "
                          "used here")
            tokenizer = own
    tokenizer.template_args = template_args or {}
    return tokenizer


def splitting(tokenizer):
    """How a tokenizer splits a text before its vocabulary matters."""
    backend = tokenizer.backend_tokenizer
    return str(backend.normalizer), str(backend.pre_tokenizer)


def load_weights(kind, path, **kwargs):
    """A complete model of that kind: what its checkpoint lacks, transformers would make up at random."""
    model, report = load(kind, path, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs)
    mismatched = [str(key[0]) for key in report["mismatched_keys"]]
    lacks = sorted(report["missing_keys"]) + sorted(mismatched)
    if lacks:
        more = f" and {len(lacks) - 5} more" if len(lacks) > 5 else ""
        rows.fail(f"{path}: its checkpoint lacks {', '.join(lacks[:5])}{more} (or has them in other "
                  f"sizes), which {type(model).__name__} needs; give a complete checkpoint of that kind")
    return model


def load_model(path, dtype, device, trust_remote_code=False):
    """The causal LM of a Hugging Face folder. In training, too, it has no dropout."""
    config = load_config(path, trust_remote_code)
    kind = transformers.AutoModelForCausalLM
    quantised = dequantization(path, config)
    model = load_weights(kind, path, config=config, dtype=dtype, trust_remote_code=trust_remote_code,
                         **quantised)
    if quantised:  # else save_pretrained would give the plain weights the names of the quantised ones
        vars(model).pop("_weight_conversions", None)
        model = model.to(dtype)
    model = model.to(device).eval()
    model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = is_tied(model)
    prepare(model)
    return model


def is_tied(model):
    """Whether the output layer is the input embedding. The checkpoint decides, whatever the config says."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def load_skeleton(path, dtype, device, trust_remote_code=False):
    """As `load_model`, without weights, for `shard` to fill: rank 0 alone reads them, to its CPU."""
    source, facts = None, [None]
    if rows.rank_and_world()[0] == 0:
        threads = torch.get_num_threads()  # torchrun gives one, but the other ranks wait
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        # in that dtype, not as they are stored: what a model computes when it is made, such as Gemma's scale
        # of embeddings, is rounded to its dtype
        source = load_model(path, dtype, torch.device("cpu"), trust_remote_code)
        frozen = [name for name, parameter in source.named_parameters() if not parameter.requires_grad]
        ids = probe_ids(source)
        facts = [{"config": source.config, "generation_config": source.generation_config, "frozen": frozen,
                  "backbone_name": source.backbone_name, "ids": ids.tolist(),
                  "token_logps": token_logps(Policy(source), ids)}]
        torch.set_num_threads(threads)
    try:
        barrier()  # rank 0 may read for long
        dist.broadcast_object_list(facts)
    except RuntimeError:
        sys.exit(2)  # rank 0 has failed, and said why
    loaded = facts[0]
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            loaded["config"], dtype=dtype, trust_remote_code=trust_remote_code)
    model.generation_config = loaded["generation_config"]
    model.backbone_name = loaded["backbone_name"]
    for name in loaded["frozen"]:
        model.get_parameter(name).requires_grad_(False)
    model.source = [source]  # for `shard`; in a list, or it would become a submodule
    model.loaded = loaded
    return model.eval()


def add_lora(model, rank, seed):
    """Put LoRA adapters (arXiv 2106.09685), float32, on every linear layer of the backbone that text reaches,
    and freeze the rest. They start as 0 (B = 0): the model is still the reference. The experts of a mixture
    are one tensor, and some routers more than a linear layer, so they stay frozen. Returns peft's model.
    """
    import peft
    prefix = f"{model.backbone_name}."
    linear = [name for name, module in model.named_modules() if name.startswith(prefix)
              and type(module) in (torch.nn.Linear, Conv1D) and module.weight.requires_grad]
    torch.manual_seed(seed)  # the same on every rank
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=linear, task_type="CAUSAL_LM")
    kind = model.config.model_type
    try:
        adapter = peft.get_peft_model(model, config)
    except ValueError as error:
        rows.fail(f"{model.name_or_path}: peft does not adapt a {kind} model ({error}); omit --lora")
    adapted = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    if sorted(adapted) != sorted(linear):
        rows.fail(f"{model.name_or_path}: in a {kind} model peft {peft.__version__} adapts the experts, "
                  "which are not linear layers here; omit --lora")
    for module in adapted.values():  # autocast converts what it must; to float32 and back took 15% of a step
        module.cast_input_dtype_enabled = False
    return adapter


def find_backbone(model, ids):
    """The name of the part of a causal LM whose last hidden states its output layer reads: the last that
    gives some while the model runs. Also the model's logits of these token ids, (1, time, vocab).
    """
    found, hooks = [], []
    for name, module in model.named_modules():
        def hook(module, inputs, output, name=name):
            if hasattr(output, "last_hidden_state"):
                found.append(name)
        hooks.append(module.register_forward_hook(hook))
    try:
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    return found[-1], logits


def backbone(model):
    """The part of a causal LM that gives its last hidden states."""
    return model.get_submodule(model.backbone_name)


def logits_of(model, output, hidden):
    """The model's logits (n, vocab) of hidden states (n, dim) from `output`, which its backbone returned.

    Its own forward makes them, whatever a family does there (scales, caps, another layer). For this call,
    the backbone's forward is replaced by one that returns these states, as an output of the same class.
    """
    inner = backbone(model)
    inner.forward = lambda *args, **kwargs: type(output)(last_hidden_state=hidden[None])
    try:
        ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        return model(input_ids=ids, use_cache=False).logits.squeeze(0)  # [0] would copy the gradient
    finally:
        del inner.forward  # the class's own again


def prepare(model):
    """Find the backbone of a model, and freeze the parameters that its logits do not depend on. Refuses a
    model whose log-probabilities this code would compute wrongly.
    """
    name, config = model.name_or_path, model.config
    ids = probe_ids(model)
    try:
        model.backbone_name, logits = find_backbone(model, ids)
        with torch.no_grad():
            output = backbone(model)(input_ids=ids, use_cache=False)
            hidden = output.last_hidden_state[0]  # (time, dim)
            start = backbone(model)(input_ids=ids[:, :8], use_cache=False).last_hidden_state[0]  # (8, dim)
            found = logits_of(model, output, hidden)
    except Exception as error:  # whatever the code of a family raises
        rows.fail(f"{name}: a {config.model_type} model cannot be run on text alone ({error})")
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.1  # in standard deviations
    if not (start - hidden[:8]).abs().median() < tolerance * hidden.std():
        rows.fail(f"{name}: a {config.model_type} model also looks at later tokens (is_decoder=false?), so "
                  "it has no log pi(y|x)")
    if not (found - logits[0]).abs().max() < tolerance * logits.std():
        rows.fail(f"{name}: the logits of a {config.model_type} model do not follow from its last hidden "
                  "states")
    reached = leaves(logits)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in reached)
    for module_name, module in model.named_modules():
        in_a_list = any(part.isdigit() for part in module_name.split("."))
        if in_a_list and isinstance(module, torch.nn.ModuleList):
            rows.fail(f"{name}: a {config.model_type} model has experts that are modules of their own "
                      f"({module_name}), and not each is reached by every batch; give one whose experts are "
                      "one tensor, as in transformers")


def probe_ids(model):
    """Token ids to try a model on, (1, time)."""
    vocab_size = model.get_input_embeddings().weight.shape[0]
    length = min(256, context_length(model))
    return 7 * torch.arange(length, device=model.device)[None] % vocab_size


def leaves(tensor):
    """The set of the parameters that a tensor was computed from."""
    found, seen, stack = set(), set(), [tensor.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack += [before for before, _ in node.next_functions]
        if hasattr(node, "variable"):
            found.add(node.variable)
    return found


# ---- the files of a model ----

WEIGHTS = "*.safetensors", "*.bin", "*.index.json"
# all that belongs to a model besides its weights: configuration, tokenizer, template, processor, code
OTHER_FILES = ("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json",
               "added_tokens.json", "vocab*", "merges*", "*.model", "*.spm", "*.tiktoken", "tekken.json",
               "chat_template*", "additional_chat_templates/*", "*processor_config.json", "*.py")


def files_of(folder, patterns):
    """The files of a folder that match one of the patterns, sorted."""
    return sorted({path for pattern in patterns for path in Path(folder).glob(pattern) if path.is_file()})


def model_fingerprint(path):
    """What tells one model and tokenizer from another, copied or not: names, sizes, and 16 KiB of its files
    at 256 places, as training may leave parts as they are (LoRA: embeddings). A hub name stands for itself.
    """
    if not os.path.isdir(path):
        return path
    found = []
    for file in files_of(path, WEIGHTS + OTHER_FILES):
        size = file.stat().st_size
        with open(file, "rb") as content:
            digest = hashlib.sha256()
            for place in range(0, size, max(size // 256, 1 << 14)):
                content.seek(place)
                digest.update(content.read(1 << 14))
        found.append((file.name, size, digest.hexdigest()))
    return rows.fingerprint(found)


def save_model(model, source, folder, adapter=None):
    """Write the model to a Hugging Face folder, complete or not at all; every rank calls it. Weights are
    float32, so what is saved is what was trained. All else is copied from `source`, the folder or hub name
    that it was loaded from, so that whatever reads that reads this.

    adapter: peft's model of `add_lora`. It is merged into the weights, and also saved in FOLDER/adapter.
    """
    # gathers one tensor at a time; only rank 0 keeps it, on its CPU
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    if rows.rank_and_world()[0] == 0:
        weights = {name: tensor.float() if tensor.is_floating_point() else tensor
                   for name, tensor in merged(model, state).items()}
        with rows.replacing(folder) as new:
            try:
                model.save_pretrained(new, state_dict=weights)
                if adapter:
                    adapter.save_pretrained(new / "adapter", save_embedding_layers=False)
            except SafetensorError as error:  # such as of a full disk
                raise OSError(str(error)) from None
            copy_files(model, source, new)
    barrier()


def merged(model, state):
    """A state dict with each adapter (see `add_lora`) added to its weight, and tied weights once."""
    twice = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    twice -= {name for name, _ in model.named_parameters()}
    found = {}
    for name, tensor in state.items():
        layer, base, parameter = name.rpartition(".base_layer.")
        if base and parameter == "weight":
            delta = model.get_submodule(layer).get_delta_weight("default")
            tensor = tensor.float() + delta.to(tensor.device)
        if ".lora_" not in name and name not in twice:
            found[name.replace(".base_layer.", ".")] = tensor
    return found


def copy_files(model, source, folder):
    """Put all files of `source` but its weights into a folder that `save_pretrained` wrote. Its
    configuration then says what has become of the weights: float32, tied or not, not quantised.
    """
    if not os.path.isdir(source):
        source = huggingface_hub.snapshot_download(source, allow_patterns=list(OTHER_FILES))
    written = rows.load_json(folder / "config.json")
    for file in files_of(folder, OTHER_FILES):
        file.unlink()
    for file in files_of(source, OTHER_FILES):
        copy = folder / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)
    config = rows.load_json(folder / "config.json")
    if config.get("model_type") != written["model_type"]:  # the text model of a larger one
        config = written
    config.pop("quantization_config", None)
    tied = is_tied(model)
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in {"dtype", "torch_dtype"} & part.keys():
            part[key] = "float32"
        if part.get("tie_word_embeddings", tied) != tied:
            part["tie_word_embeddings"] = tied
    if not {"dtype", "torch_dtype"} & config.keys():
        config["dtype"] = "float32"
    rows.write_json(folder / "config.json", config)


# ---- what models and tokenizers say of themselves ----

def context_length(model):
    """Tokens that the model can attend to, prompt and completion together.

    longrope (Phi-3 with 128k) turns to other rotations for all sequences of a batch when one exceeds
    the original length, so log-probabilities would depend on the batch: such a context ends there.
    Dynamic NTK does so beyond max_position_embeddings, which nothing here exceeds. Llama 4 scales attention
    by the number of columns in its cache, from floor_scale (8192) on.
    """
    config = model.config.get_text_config()
    length = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None) or -1
    if length < 1:  # it names no limit
        length = 1 << 30
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        length = min(length, rope["original_max_position_embeddings"])
    if getattr(config, "attn_temperature_tuning", False):
        length = min(length, config.floor_scale)
    return length


# ---- log pi(y|x) ----

CHUNK = 1024  # positions whose logits exist at a time: 0.5 GB in float32 for a vocabulary of 128k


class Policy(torch.nn.Module):
    """The model with log pi(completion | prompt) as its forward: what DDP and FSDP wrap.

    length_groups: a batch goes through the model in that many groups of similar length: with 2, pairs waste
    less on padding (25% -> 5%). It changes no result.
    """

    def __init__(self, model, length_groups=1):
        super().__init__()
        self.model = model
        self.length_groups = length_groups

    def forward(self, tokens, prompt_lens, lens):
        """tokens (batch, time), right-padded with anything; prompt_lens, lens (batch,): tokens of the prompt,
        and of prompt and completion together -> float32 (batch,), summed over the completion's tokens.

        There is no attention mask: the padding comes after everything that a causal model can look at.
        """
        order = lens.argsort(descending=True, stable=True)
        states = []
        for group in order.chunk(self.length_groups):
            longest = lens[group].max().item()  # a number: each use of a tensor as one would wait for the GPU
            output = backbone(self.model)(input_ids=tokens[group, :longest], use_cache=False)
            hidden = output.last_hidden_state
            states.append(torch.nn.functional.pad(hidden, (0, 0, 0, tokens.shape[1] - longest)))
        hidden = torch.cat(states)[order.argsort()]  # (batch, time, dim)
        output_layer = functools.partial(logits_of, self.model, output)
        return chunked_logps(hidden, tokens, prompt_lens, lens, output_layer)


def chunked_logps(hidden, tokens, prompt_lens, lens, output_layer):
    """qrpo.completion_logps of output_layer(hidden) without a (batch, time, vocab) tensor; (batch,).

    hidden: (batch, time, dim), the last hidden states of tokens (batch, time). output_layer: maps (n, dim) to
    logits (n, vocab). It runs at completion positions only, CHUNK of them at a time, and once more in the
    backward pass (except for the last chunk, where the backward pass begins).
    """
    position = torch.arange(1, tokens.shape[1], device=tokens.device)
    in_completion = (position >= prompt_lens[:, None]) & (position < lens[:, None])  # (batch, time-1)
    where = in_completion.nonzero(as_tuple=True)  # waits for a GPU, so only once
    states = hidden[:, :-1][where]  # (n, dim)
    labels = tokens[:, 1:][where]   # (n,)

    def chunk_logps(states, labels):
        return TokenLogps.apply(output_layer(states), labels)

    *chunks, last = zip(states.split(CHUNK), labels.split(CHUNK))
    token_logps = [checkpoint(chunk_logps, *chunk, use_reentrant=False) for chunk in chunks]
    token_logps = torch.cat([*token_logps, chunk_logps(*last)])  # (n,)
    table = torch.zeros(in_completion.shape, device=tokens.device).index_put(where, token_logps)
    return table.sum(1)


class TokenLogps(torch.autograd.Function):
    """logits (n, vocab), labels (n,) -> log-probabilities of the labels, float32 (n,).

    As -cross_entropy, except that the backward pass writes the gradient over the saved
    log-probabilities: one (n, vocab) tensor less, of the largest of all.
    """

    @staticmethod
    def forward(ctx, logits, labels):
        logps = logits.float().log_softmax(1)
        ctx.save_for_backward(logps, labels)
        ctx.dtype = logits.dtype
        return logps.gather(1, labels[:, None])[:, 0]

    @staticmethod
    def backward(ctx, gradient):
        logps, labels = ctx.saved_tensors
        out = logps.exp_().mul_(-gradient[:, None])  # d logp_y / d logit_v = [v = y] - p_v
        return out.scatter_add_(1, labels[:, None], gradient[:, None]).to(ctx.dtype), None


def shard(policy, dtype, device):
    """The policy of a `load_skeleton` with its parameters, and so gradients and optimizer states,
    sharded across ranks (FSDP2). No rank ever holds more on its device than its part and one parameter
    or layer.
    """
    model = policy.model
    param_dtype = None if dtype == torch.float32 else dtype  # None: as they are
    precision = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
    blocks = set(model._no_split_modules or ())
    for module in reversed(list(policy.modules())):  # a block within a block (Mamba) first
        if type(module).__name__ in blocks:
            fully_shard(module, mp_policy=precision)
    # sharded again after every forward, so that the optimizer and checkpoints see this rank's part
    policy = fully_shard(policy, mp_policy=precision, reshard_after_forward=True)
    policy.to_empty(device=device)

    source = model.source.pop()
    weights = source.state_dict() if source else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, weights, options=options)
    with torch.no_grad():
        for name, buffer in model.named_buffers():  # those that no checkpoint holds, too
            if source:
                buffer.copy_(source.get_buffer(name))
            dist.broadcast(buffer, 0)

    expected = model.loaded["token_logps"]
    found = token_logps(policy, torch.tensor(model.loaded["ids"], device=device)).cpu()
    tolerance = 1e-3 if dtype == torch.float32 else 0.1  # in standard deviations
    if not (found - expected).abs().median() < tolerance * expected.std():
        rows.fail(f"--shard: the sharded {model.config.model_type} model has other logits than the "
                  "loaded one; omit it")
    return policy


@torch.no_grad()
def token_logps(policy, ids):
    """log pi of every eighth token of ids (1, time), each after the seven before it."""
    tokens = ids[0, :ids.shape[1] // 8 * 8].view(-1, 8)
    lens = torch.full((len(tokens),), 8, device=ids.device)
    return policy(tokens, lens - 1, lens)


def sync_gradients(policy, sync):
    """Whether the next backward pass averages gradients over the ranks: only that of a step's last
    micro-batch need do it. Call it before the forward pass.
    """
    if isinstance(policy, FSDPModule):
        policy.set_requires_gradient_sync(sync)
    elif isinstance(policy, DistributedDataParallel):
        policy.require_backward_grad_sync = sync


def checkpoint_activations(model):
    """Recompute the activations of every layer in the backward pass: less memory, slower."""
    try:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    except ValueError:
        rows.fail(f"{model.name_or_path}: a {model.config.model_type} model cannot recompute its "
                  "activations; omit --gradient_checkpointing")
    for module in model.modules():  # these layers recompute only in training mode
        if getattr(module, "gradient_checkpointing", False):
            module.training = True


# ---- optimisation, and the state of a run to resume from ----

def cosine(step, num_steps, warmup):
    """The share of the peak learning rate: a linear warm-up over a share of the steps, then a cosine to 0."""
    warmup_steps = math.ceil(warmup * num_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(num_steps - warmup_steps, 1)))


def trained_state(policy, optimizer):
    """The trained parameters and AdamW's state by name, as tensors that can be saved and loaded in place.
    Nothing else is needed: the only randomness of a step is the order of the data, which its number gives.
    """
    trained_only = StateDictOptions(ignore_frozen_params=True, strict=False)
    weights, state = get_state_dict(policy, optimizer, options=trained_only)
    return {"weights": weights, "optimizer": state}


def save_state(folder, step, policy, optimizer):
    """FOLDER/step_N, of which every rank writes its part; older ones are deleted. dcp writes .metadata last,
    so a folder with that file is complete.
    """
    with rows.writing(folder):
        try:
            dcp.save(trained_state(policy, optimizer), checkpoint_id=folder / f"step_{step:06d}",
                     no_dist=not dist.is_initialized())
        except dcp.CheckpointException as error:  # such as of a full disk
            raise OSError(str(error).strip().splitlines()[-1]) from None
    barrier()
    if rows.rank_and_world()[0] == 0:
        for old in folder.glob("step_*"):
            if old.name != f"step_{step:06d}":
                shutil.rmtree(old)
    barrier()


def load_state(folder, policy, optimizer):
    """Load the newest complete state, into any number of ranks, and return its step; 0 if there is none."""
    newest = max(folder.glob("step_*/.metadata"), default=None)
    if newest is None:
        return 0
    state = trained_state(policy, optimizer)
    dcp.load(state, checkpoint_id=newest.parent, no_dist=not dist.is_initialized())
    set_state_dict(policy, optimizer, model_state_dict=state["weights"], optim_state_dict=state["optimizer"],
                   options=StateDictOptions(strict=False))
    return int(newest.parent.name.removeprefix("step_"))


# ---- speed ----

# bfloat16, dense, as their maker states. The first name that is part of the device's counts: an H100 on a
# PCIe card and an H100 NVL are slower than an H100 SXM
PEAK_FLOPS = {"A100": 312e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200 NVL": 835e12,
              "H200": 989e12, "GH200": 989e12, "B200": 2250e12, "L40S": 362e12}


def peak_flops(device):
    """bfloat16 operations per second of this GPU at best, or None."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    for part, peak in PEAK_FLOPS.items():
        if part in name:
            return peak
    return None


def flops_per_token(model, length):
    """Floating-point operations of training on one token of a sequence of that length: 6 per weight
    that multiplies (an input embedding does not, nor do experts that the token does not pass), and
    attention's 6 * layers * hidden_size * length (half of the square, as it is causal).
    """
    config = model.config.get_text_config()
    passed = getattr(config, "num_experts_per_tok", None)
    weights = 0
    for parameter in model.parameters():
        is_experts = parameter.dim() == 3 and passed and passed < len(parameter)  # (experts, out, in)
        weights += parameter.numel() * (passed / len(parameter) if is_experts else 1)
    if not is_tied(model):
        weights -= model.get_input_embeddings().weight.numel()
    return 6 * (weights + config.num_hidden_layers * config.hidden_size * length)
