"""Keys and values while completions are sampled, written in place.

generate_refs.sample makes one `Cache`, which a model of transformers gets as its past_key_values. A
completion joins the cache with its prompt's, gets a column in every step, and leaves.

    python -m pytest -q tests/test_sampling.py
"""
import torch
import transformers


class Cache(transformers.Cache):
    """Keys and values of at most `max_rows` active completions. (A DynamicCache copies all at every step.)

    Each buffer is (max_rows, heads, columns, dim). Completion i is row i; its tokens, prompt included, end
    at column `end`, the same for all, so that a step writes one column, and begin at starts[i]. The rows in
    use are the first len(starts):

        . . a a a a a a _ _     starts = [2, 4, 5], end = 8. `join` adds one below, which ends at `end`;
        . . . . b b b b _ _     `leave` moves the last one into the place of one that ended; if no column is
        . . . . . c c c _ _     left, `make_room` copies all of them to the left of a wider buffer
    """

    FREE_COLUMNS = 128  # in new buffers: steps until they are copied again

    def __init__(self, max_rows):
        super().__init__(layers=[])
        self.max_rows = max_rows
        self.buffers = []  # keys and values of each layer
        self.starts = []   # of each active completion
        self.end = 0

    # ---- what transformers calls ----

    def get_seq_length(self, layer_idx=0):
        return self.end - min(self.starts)  # the model does not see the columns before all starts

    def get_mask_sizes(self, query_length, layer_idx):
        return self.get_seq_length() + query_length, 0

    def update(self, keys, values, layer_idx, *args, **kwargs):
        n = len(self.starts)
        first = min(self.starts)
        found = []
        for new, buffer in zip((keys, values), self.buffers[2 * layer_idx:]):
            buffer[:n, :, self.end] = new[:, :, 0]
            found.append(buffer[:n, :, first:self.end + 1])
        return found

    # ---- completions come and go ----

    def join(self, prompt):
        """A new last completion. prompt: keys and values of each layer, (heads, length, dim)."""
        if not self.buffers:
            for tensor in prompt:
                heads, _, dim = tensor.shape
                self.buffers.append(tensor.new_zeros(self.max_rows, heads, 0, dim))
        length = prompt[0].shape[1]
        if self.end < length:
            self.make_room(length)
        row = len(self.starts)
        start = self.end - length
        for buffer, tensor in zip(self.buffers, prompt):
            buffer[row, :, start:self.end] = tensor
        self.starts.append(start)

    def leave(self, i):
        """Completion i has ended: the last one takes its row."""
        start = self.starts.pop()
        last = len(self.starts)
        if i == last:
            return
        self.starts[i] = start
        for buffer in self.buffers:
            buffer[i, :, start:self.end] = buffer[last, :, start:self.end]

    def make_room(self, before=0):
        """New buffers with free columns, the completions at their left end but at least `before`
        columns from it.
        """
        n = len(self.starts)
        first = min(self.starts, default=self.end)
        end = max(before, self.end - first)
        shift = end - self.end
        for i, old in enumerate(self.buffers):
            _, heads, _, dim = old.shape
            # zeros: what is masked must still be finite
            new = old.new_zeros(self.max_rows, heads, end + self.FREE_COLUMNS, dim)
            new[:n, :, first + shift:end] = old[:n, :, first:self.end]
            self.buffers[i] = new
        self.starts = [start + shift for start in self.starts]
        self.end = end

    def step(self):
        """What the model is called with for one more token of each completion: its attention_mask,
        (n, columns), and its position_ids, (n, 1). After the call, add 1 to `end`.
        """
        if self.end == self.buffers[0].shape[2]:
            self.make_room()
        starts = torch.tensor(self.starts, device=self.buffers[0].device)[:, None]
        columns = torch.arange(min(self.starts), self.end + 1, device=starts.device)
        return columns >= starts, self.end - starts
