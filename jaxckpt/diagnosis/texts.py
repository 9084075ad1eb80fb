"""What each kind of finding says: the sentence and the advice. Kinds are stable names; sources stand beside them."""

TEXTS: dict[str, tuple[str, str]] = {
    "whole-function": (
        "One checkpoint is around the whole function. All of it is recomputed at once, before the backward pass "
        "begins, and then everything is live again.",
        "Take it out, and put one around each layer instead.",
    ),
    "flat-policy": (
        "One checkpoint with a policy is around the whole function. What the policy does not save is recomputed at "
        "once, before the backward pass begins, so that all of it is live again beside what is saved.",
        "Put the checkpoint with its policy around each layer.",
    ),
    "last-layer": (
        "The checkpoint is around what runs last. Its backward is first, so that what it would save is recomputed at "
        "the peak.",
        "Take it out of the last layer.",
    ),
    "loop-from-outside": (
        "The checkpoint is around a loop, whose recomputation keeps the residuals of every iteration again.",
        "Put the checkpoint around the loop's body: jax.checkpoint(body, prevent_cse=False).",
    ),
    "whole-shard-map": (
        "The checkpoint is around a whole shard_map: all that runs in it is recomputed at once, and then everything "
        "is live again.",
        "Put checkpoints inside, around each layer of the function that shard_map is given.",
    ),
    "nested": (
        "The checkpoint is inside another one, {outer}, which saves as much without it. What is inside is recomputed "
        "twice.",
        "Take the inner one out, or give the outer one more layers.",
    ),
    "cse-outside-loop": (
        "prevent_cse=False outside of a loop lets the compiler merge the recomputation with what the forward pass "
        "computed: then that is saved after all.",
        "Leave prevent_cse out; it may be False only around the body of a loop.",
    ),
    "cse-in-loop": (
        "A checkpoint around the body of a loop has barriers that nothing needs: forward and backward are loops of "
        "their own, and nothing can be merged. They keep the compiler from fusing across them.",
        "Write prevent_cse=False there.",
    ),
    "kernel-recomputed": (
        "The policy saves products but not what the Pallas kernel {names} makes, and so the kernel runs again in the "
        "backward pass.",
        "Name the kernel's result with checkpoint_name and save that name too.",
    ),
    "names-nowhere": (
        "The policy saves {names}, and no value in the function has such a name: that part of it does nothing.",
        "Name values with jax.ad_checkpoint.checkpoint_name, or mend the spelling.",
    ),
    "names-outside": (
        "The policy saves {names}. Values of that name stand outside of this checkpoint, where its policy has no say.",
        "Put checkpoint_name inside the function that is checkpointed, or the checkpoint around the named value.",
    ),
    "names-no-residual": (
        "The policy saves {names}, and nothing in the backward pass reads that: saving it does nothing.",
        "Leave it out of the policy, or name what the backward pass reads.",
    ),
    "constant-saved-by-iterations": (
        "Every iteration of the loop saves a copy of the same {names}, which depends on no iteration.",
        "Compute it before the loop and pass it in, or recompute it in the backward pass.",
    ),
    "slices-saved": (
        "Every iteration of the loop saves its slice of an array that is there anyway, {names}: together a copy of it.",
        "Loop over the array with lax.scan's xs in place of an index, or recompute the slice in the backward pass.",
    ),
    "gathers-saved": (
        "What all-gathers bring together, {names}, is saved from the forward to the backward pass: each device holds "
        "the whole of what is divided.",
        "Put the gather inside jax.checkpoint with a policy that does not save it, so that it is gathered again.",
    ),
    "barriers-removed": (
        "{names} takes away the barriers that keep recomputation apart: checkpoints save less than they could.",
        "Unset it.",
    ),
    "saves-nothing": (
        "The checkpoint saves nothing: the program takes as many bytes without it.",
        "Take it out, or move it to where the peak is.",
    ),
}
