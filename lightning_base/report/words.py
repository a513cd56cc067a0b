"""What the headings of columns mean, said once, under the first table that has the heading; and what tables show."""

WORDS = {
    "validation loss": "mean negative log-likelihood per token [nats] over the whole validation text after the last "
    "step, routed as in use (final/loss); lower is better",
    "difference": "loss minus that of the reference [nats], seed by seed, over the seeds that both have; below 0 is "
    "better than the reference",
    "p": "two-sided paired t test against no difference, corrected after Holm for the number of arms held against the "
    "reference; below 0.05, in bold, is beyond the noise between seeds",
    "between seeds": "sample standard deviation of the validation loss between seeds: the noise a single run has",
    "bits per byte": "summed negative log-likelihood / ln 2 / bytes of text; does not depend on the tokenizer",
    "tokens/s": "training tokens per second, all processes together: median over the log windows after the first, with "
    "quartiles; validation and checkpoints excluded",
    "scaled tokens/s": "tokens/s times how much slower the reference kernel ran beside this arm than beside the "
    "quietest: an estimate of the speed on a quiet machine",
    "drop rate": "token-expert pairs that found their expert full, as a share of those asked for (tokens * k * layers, "
    "or fewer where tokens may ask for fewer)",
    "max_vio": "how far the fullest expert is above an even share: (max n - mean n) / mean n over the counts n of the "
    "experts, mean over layers; 0 is even, E - 1 is everything on one expert (arXiv 2408.15664, eq. 4). In training of "
    "the load in one routing group, mean over logged steps; in evaluation: over the whole validation text",
    "bootstrap": "95 % percentile interval of the mean difference over seeds drawn again with replacement; with few "
    "seeds it is too narrow, and the t interval is the one to trust",
    "better in": "in how many seeds the loss is lower than that of the other",
    "held against": "the other arm of the difference; p is corrected for the arms held against the same one",
    "steps": "the loss after equally many optimizer steps, hence tokens",
    "FLOPs": "the loss when equally many FLOPs were spent: steps * tokens per step * FLOPs per token",
    "time": "the loss after equally many seconds in training steps, validation and checkpoints excluded",
    "seconds to loss": "seconds in training steps until the validation curve reaches the loss that all arms reach",
    "under unigram": "unigram entropy minus validation loss [nats]; the unigram entropy is the cross-entropy of the "
    "validation tokens under their frequencies in the training text: above 0, more was learnt than how frequent each "
    "token is",
    "perplexity": "exp(validation loss)",
    "active parameters": "parameters that one token meets: all but the experts, plus top_k of the num_experts experts",
    "total parameters": "all parameters",
    "FLOPs/token": "floating-point operations of the matrix products of one training step, forward and backward, per "
    "token, counted on a real batch and scaled to no dropped token",
    "experts": "E, experts per sparse layer",
    "k": "experts that every token asks for",
    "capacity factor": "an expert takes at most ceil(capacity factor * T k / E) of the T tokens of a routing group; a "
    "dash: no limit (Switch, arXiv 2101.03961)",
    "tokens": "tokens trained on, padding excluded",
    "dropped": "token-expert pairs, over all sparse layers and steps, that found their expert full",
    "measured over": "training: mean over logged steps, measured inside single routing groups (train_group) or over "
    "a whole optimizer step of all processes (train_step); evaluation: over the whole validation text after the last "
    "step (final_pass), and again for every other way the router can route there",
    "load_cv": "population standard deviation of n / mean n, mean over layers (Shazeer et al. 2017)",
    "loss": "validation loss [nats per token] when routed this way",
    "evaluation": "how tokens were routed; the first is the one that counts",
    "tokens that differ": "share of tokens whose set of experts is another one, mean over layers",
    "chosen": "share of earlier tokens whose set of experts changes when only later tokens change "
    "(final_causality/leak_*_expert/max)",
    "gates": "the same for the gate, the weight an expert's output is multiplied with",
    "drops": "the same for whether the token is dropped",
    "any": "the same for any of these: the leak; above 0 in evaluation, the loss is not that of a language model",
    "router": "gates, choice of experts and losses, without the assignment",
    "assignment": "solving a balanced assignment (BASE), or approximating one (S-BASE, BIP)",
    "dispatch": "sorting tokens by expert, and sending them to other processes if these hold it",
    "expert networks": "forward",
    "combine": "bringing outputs back, by weight",
    "other forward": "attention, dense layers, embedding and loss",
    "waiting": "for the slowest process, before gradients are reduced",
    "backward and optimizer": "the rest of the step",
    "idle, over processes": "1 - mean/max over processes of the tokens their experts compute",
    "idle, over experts": "1 - mean/max over experts, as if each had a process of its own",
    "sent": "bytes that a process sends to others for one sparse layer in one optimizer step, forward and backward, "
    "mean over processes and layers",
    "busiest process": "the most that one process sends or receives over that mean; 1 if all do the same; worst layer",
    "largest message": "bytes from one process to another at once; worst layer",
    "uneven dispatch": "the largest message with tokens for experts over the mean one; 1 for equal loads; worst layer",
    "ms a layer": "from when a process is ready to when all has arrived, summed over the messages of a layer in a step",
    "ms for the slowest": "of these, waiting until the slowest process is ready too",
    "share of the step": "the time of the exchange, all layers, over the time of the step",
    "gradients": "bytes that a process sends to reduce gradients in a step: computed from the sizes of the parameters, "
    "for a ring, and not measured",
    "batched padding": "share of padding if every expert got as many rows as the fullest one",
    "empty slots": "share of empty slots in buffers of the experts' capacity",
    "idle time, over processes": "1 - mean/max over processes of the seconds spent in experts",
}
CONTRAST_LEAD = "Differences of the final validation loss [nats per token], seed by seed."
LEAK_LEAD = (
    "A leak: in routing groups of validation text, everything in the second half was replaced by other text; the share "
    "of tokens in the first half whose expert, gate or drop changed. Worst layer; each layer's router by itself."
)
TIME_LEAD = (
    "Shares of an optimizer step, mean over the logged steps after the first and over processes. Router to combine are "
    "the sparse layers in the forward pass; waiting is for slower processes."
)
COMMUNICATION_LEAD = (
    "Mean over the logged steps after the first. What a process keeps is not sent. The time of gradients is not "
    "in here: they are reduced while the backward pass runs."
)
COMPUTE_LEAD = (
    "Idle fraction: 1 - mean / max of the tokens computed, over processes as they ran and over experts as if each had "
    "a process of its own; 0 is even, 1 - 1/E is everything on one expert. Uniform and skewed routing are the two ends."
)
GAP_LEAD = (
    "The same validation text routed in each of the router's ways: how many tokens change their experts, and the loss "
    "and the fullest expert in each. From the second sparse layer on, hidden states differ too."
)
