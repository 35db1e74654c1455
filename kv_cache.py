"""The cache of keys and values for sampling. On a CPU, a prompt's are kept once for all of its completions;
those of the completions are written in place.

generate_refs.sample makes one `Cache`, which a model of transformers gets as its past_key_values. A
completion joins the cache, gets a column in every step, and leaves.

    python -m pytest -q tests/test_sampling.py
"""
import contextlib

import torch
import transformers
from torch.nn.functional import pad
from transformers.masking_utils import causal_mask_function


class Cache(transformers.Cache):
    """Keys and values of at most `batch_size` active completions. (A DynamicCache copies all at every step.)

    Each buffer is (batch_size, heads, columns, dim). Row i belongs to active[i]. Its tokens end at column
    `end`, the same for all, so that a step writes one column, and begin at active[i].start:

        . . a a a a a a _ _     starts 2, 4 and 5, end 8. `join` adds a row below, which ends at `end`;
        . . . . b b b b _ _     `leave` moves others into the row of one that ended; if no column is left,
        . . . . . c c c _ _     `make_room` moves all of them to the left, in a wider buffer if need be

    Each tensor of `prompts` is (prompts, heads, time, dim), right-padded. Completion i follows the prompt
    active[i].prompt. Without `share`, its row begins with a copy of the prompt. With `share`, it begins after
    the prompt, and the model attends to both (`attend`); and no row is younger than those of the next BLOCK
    of rows, so that a block of young ones attends to few columns, however old the oldest of all is.
    """

    FREE_COLUMNS = 128  # steps until all rows are moved again
    BLOCK = 32          # rows

    def __init__(self, batch_size, share):
        super().__init__(layers=[])
        self.max_rows = batch_size
        self.share = share
        self.block = self.BLOCK if share else batch_size
        self.active = []   # the completion of each row in use
        self.buffers = []  # keys and values of each layer
        self.first = 0     # the first column that a step reads
        self.end = 0       # the column that it writes
        self.prompts = []  # keys and values of each layer
        self.lengths = []  # of each prompt, in tokens

    # ---- what transformers calls ----

    def get_seq_length(self, layer_idx=0):
        return self.end - self.first  # the model does not see the columns before all starts

    def get_mask_sizes(self, query_length, layer_idx):
        return self.get_seq_length() + query_length, 0

    def update(self, keys, values, layer_idx, *args, **kwargs):
        n = len(self.active)
        found = []
        for new, buffer in zip((keys, values), self.buffers[2 * layer_idx:]):
            buffer[:n, :, self.end] = new[:, :, 0]
            found.append(buffer[:n, :, self.first:self.end + 1])
        found[0].cache = self  # how `attend` finds the prompts
        return found

    # ---- completions come and go ----

    def add_prompts(self, tensors, lengths):
        """Keep more prompts, (n, heads, time, dim) for the keys and the values of each layer, and drop those
        that no active completion follows. Returns the number of the first.
        """
        if not self.buffers:
            for tensor in tensors:
                _, heads, _, dim = tensor.shape
                self.buffers.append(tensor.new_zeros(self.max_rows, heads, 0, dim))
                self.prompts.append(tensor[:0])
        used = sorted({completion.prompt for completion in self.active})
        for completion in self.active:
            completion.prompt = used.index(completion.prompt)
        self.lengths = [self.lengths[number] for number in used] + lengths
        longest = max(self.lengths)
        kept = torch.tensor(used, dtype=torch.long, device=tensors[0].device)
        for i, new in enumerate(tensors):
            old = self.prompts[i][kept]
            old = pad(old, (0, 0, 0, longest - old.shape[2]))  # or cut
            new = pad(new, (0, 0, 0, longest - new.shape[2]))
            self.prompts[i] = torch.cat([old, new])
        return len(used)

    def join(self, completion):
        """A new last row, for a completion of the prompt number completion.prompt."""
        row = len(self.active)
        copied = 0 if self.share else self.lengths[completion.prompt]
        if self.end < copied:
            self.make_room(copied)
        completion.start = self.end - copied
        for buffer, prompt in zip(self.buffers, self.prompts):
            buffer[row, :, completion.start:self.end] = prompt[completion.prompt, :, :copied]
        self.active.append(completion)

    def leave(self, i):
        """Completion i has ended. The oldest of the next block takes its row, and leaves one to the oldest of
        the block after that, and so on. In the last block, the last one does.
        """
        last = len(self.active) - 1
        while i < last:
            after = i - i % self.block + self.block
            others = range(after, min(after + self.block, last + 1))
            oldest = min(others, key=lambda row: self.active[row].start, default=last)
            start = self.active[oldest].start
            for buffer in self.buffers:
                buffer[i, :, start:self.end] = buffer[oldest, :, start:self.end]
            self.active[i] = self.active[oldest]
            i = oldest
        self.active.pop()

    def make_room(self, before=0):
        """Free columns at the right: the completions move to the left, but stay `before` columns from it."""
        n = len(self.active)
        first = min((completion.start for completion in self.active), default=self.end)
        end = max(before, self.end - first)
        shift = end - self.end
        for i, old in enumerate(self.buffers):
            _, heads, columns, dim = old.shape
            new = old
            if columns < end + self.FREE_COLUMNS:
                # zeros: what is masked must still be finite
                new = old.new_zeros(self.max_rows, heads, end + self.FREE_COLUMNS, dim)
            for row in range(0, n, 16):  # a few at a time, as they move over themselves
                few = old[row:min(row + 16, n), :, first:self.end].clone()
                new[row:row + len(few), :, first + shift:end] = few
            self.buffers[i] = new
        for completion in self.active:
            completion.start += shift
        self.end = end

    # ---- a step ----

    @contextlib.contextmanager
    def step(self, model):
        """The context in which the model is called for one more token of each completion. Yields the call's
        attention_mask, (n, columns) or None, and position_ids, (n, 1).
        """
        if self.end == self.buffers[0].shape[2]:
            self.make_room()
        starts = [completion.start for completion in self.active]
        self.first = min(starts)
        self.blocks = self.attended(starts)
        starts = torch.tensor(starts, device=model.device)[:, None]
        positions = self.end - starts
        mask = torch.arange(self.first, self.end + 1, device=model.device) >= starts
        config = model.config.get_text_config()
        before = config._attn_implementation
        if self.share:
            config._attn_implementation = "shared_prompts"
            lengths = torch.tensor(self.lengths)
            positions += lengths[[completion.prompt for completion in self.active], None]
            prompt_mask = torch.arange(max(self.lengths)) < lengths[:, None]
            self.bias = self.as_bias(mask)
            self.prompt_bias = self.as_bias(prompt_mask)
            self.group_by_prompt()
            mask = None
        try:
            yield mask, positions
        finally:
            config._attn_implementation = before
        self.end += 1

    def attended(self, starts):
        """Which rows attend to which columns after `first`: pairs of slices."""
        found = []  # first rows and columns
        for row in range(0, len(starts), self.block):
            column = min(starts[row:row + self.block]) - self.first
            if not found or column >= found[-1][1] + 16:  # fewer are not worth a call of their own
                found.append((row, column))
        ends = [row for row, _ in found[1:]] + [len(starts)]
        return [(slice(row, end), slice(column, None)) for (row, column), end in zip(found, ends)]

    def as_bias(self, mask):
        """What attention adds to its scores: mask (n, columns) -> (n, 1, 1, columns)."""
        bias = torch.zeros(mask.shape, dtype=self.buffers[0].dtype).masked_fill_(~mask, -torch.inf)
        return bias[:, None, None]

    def group_by_prompt(self):
        """group (prompts, most): the completions of each prompt, filled up with completion 0. place: two
        tensors (n,), where each completion is in it.
        """
        groups = [[] for _ in self.lengths]
        places = []
        for i, completion in enumerate(self.active):
            group = groups[completion.prompt]
            places.append((completion.prompt, len(group)))
            group.append(i)
        most = max(map(len, groups))
        for group in groups:
            group += [0] * (most - len(group))
        self.group = torch.tensor(groups)
        self.place = torch.tensor(places).unbind(1)


HARMLESS = "position_ids", "use_cache"  # arguments that do not change attention


def attend(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """An attention function of transformers that reads a prompt once for all its completions. query: of one
    token each, (n, heads, 1, dim); key, value: from `Cache.update` -> (n, 1, heads, dim).

    A completion attends to its prompt and to its own tokens apart. Together they are a mean, weighted by the
    sums of the two softmaxes.
    """
    other = [name for name, given in kwargs.items() if given is not None and name not in HARMLESS]
    if other or attention_mask is not None:
        raise ValueError(f"another kind of attention: {other}")
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # gives the sums' logarithms, too
    cache = key.cache
    prompt_key, prompt_value = cache.prompts[2 * module.layer_idx:2 * module.layer_idx + 2]
    n, kv_heads, _, dim = key.shape
    query = query.reshape(n, kv_heads, -1, dim)  # of each key head
    found = []
    for rows, columns in cache.blocks:
        bias = cache.bias[rows, ..., columns]
        found.append(flash(
            query[rows], key[rows, :, columns], value[rows, :, columns], attn_mask=bias, scale=scaling))
    own, log_own = map(torch.cat, zip(*found))

    # all completions of a prompt are one sequence of queries: (prompts, kv_heads, most * query heads, dim)
    together = query[cache.group].transpose(1, 2)
    prompt, log_prompt = flash(
        together.flatten(2, 3), prompt_key, prompt_value, attn_mask=cache.prompt_bias, scale=scaling)

    def of_each(tensor):
        """(prompts, kv_heads, most * query heads, ...) -> (n, kv_heads, query heads, ...)."""
        return tensor.unflatten(2, together.shape[2:4]).transpose(1, 2)[cache.place]

    weight = torch.sigmoid(of_each(log_prompt) - log_own)[..., None]  # at least float32
    prompt = of_each(prompt).to(weight.dtype)
    mean = own.to(weight.dtype).lerp(prompt, weight)
    mean = mean.to(value.dtype)
    return mean.reshape(n, 1, -1, value.shape[-1]), None


def only_causal(mask_function, **kwargs):
    """The mask of `attend`: none. Refuses sliding windows, chunks and the like."""
    if mask_function is not causal_mask_function:
        raise ValueError("attention to less than all earlier tokens")


transformers.AttentionInterface.register("shared_prompts", attend)
transformers.AttentionMaskInterface.register("shared_prompts", only_causal)
