"""Faults that the short form of the tests has to find: one change each, and the tests that should fail.

The old text must occur exactly once in its file, so that this list fails when the code has moved on.
"""

from typing import NamedTuple


class Fault(NamedTuple):
    """A change of one place in the package.

    Args:
        name: what is wrong then.
        file: in lightning_base.
        old: what is there.
        new: what is put in its place.
        tests: arguments of pytest, within tests.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str


FAULTS = [
    Fault(
        "later tokens are served first",
        "routing/capacity.py",
        "place[order] = torch.arange(len(queue), device=queue.device) - starts[sorted_queue]",
        "place[order] = (starts + counts)[sorted_queue] - 1 - torch.arange(len(queue), device=queue.device)",
        "routing/test_capacity.py",
    ),
    Fault(
        "second choices are served before first ones",
        "routing/top_k.py",
        "weight, expert_index = weight_TK.t().reshape(-1), expert_TK.t().reshape(-1)",
        "weight, expert_index = weight_TK.flip(1).t().reshape(-1), expert_TK.flip(1).t().reshape(-1)",
        "routing/test_top_k.py routing/test_capacity.py",
    ),
    Fault(
        "capacity is rounded down",
        "routing/capacity.py",
        "[math.ceil(round(",
        "[math.floor(round(",
        "routing/test_capacity.py",
    ),
    Fault(
        "capacity forgets k",
        "routing/capacity.py",
        "capacity_factor * size * top_k / num_experts",
        "capacity_factor * size / num_experts",
        "routing/test_capacity.py",
    ),
    Fault(
        "load is counted before the drop",
        "metrics/expert_load.py",
        "+= plan.load\n",
        "+= plan.demand\n",
        "metrics/test_expert_load.py",
    ),
    Fault(
        "demand is counted after the drop",
        "metrics/expert_load.py",
        "+= plan.demand\n",
        "+= plan.load\n",
        "metrics/test_expert_load.py",
    ),
    Fault(
        "the drop rate is taken of the tokens",
        "metrics/expert_load.py",
        '["window/drop_rate"] = 1 - dispatched / asked',
        '["window/drop_rate"] = 1 - dispatched / self.tokens',
        "metrics/test_expert_load.py",
    ),
    Fault(
        "max_vio is taken over all layers",
        "metrics/balance.py",
        "return (n.amax(-1) - mean) / mean",
        "return (n.amax() - mean) / mean",
        "metrics/test_balance.py",
    ),
    Fault(
        "bits per byte are nats",
        "metrics/language_model.py",
        "self.nll / math.log(2) / self.bytes",
        "self.nll / self.bytes",
        "metrics/test_language_model_loss.py",
    ),
    Fault(
        "the load-balancing loss lacks its factor E",
        "routing/losses.py",
        "loss_G = group_demand_GE.shape[1] * (share_GE",
        "loss_G = (share_GE",
        "routing/test_load_balancing_loss.py",
    ),
    Fault(
        "the load-balancing loss is not divided by k",
        "routing/losses.py",
        "share_GE = group_demand_GE / asked_G",
        "share_GE = group_demand_GE / torch.tensor(groups.sizes).clamp(min=1)[:, None]",
        "routing/test_load_balancing_loss.py",
    ),
    Fault(
        "the loss over a step counts one rank",
        "module.py",
        "return sum_over_ranks(counts, self._reduce)",
        "return counts",
        "distributed/test_gradient_audit.py",
    ),
    Fault(
        "auxiliary losses grow with the ranks",
        "module.py",
        "loss = loss + coefficient * auxiliary",
        "loss = loss + coefficient * auxiliary * self.trainer.world_size",
        "distributed/test_gradient_audit.py",
    ),
    Fault(
        "a micro batch's loss is not scaled",
        "module.py",
        "loss = share * parts",
        "loss = share",
        "distributed/test_world_size_changes_nothing.py",
    ),
    Fault(
        "BASE's gate has no gradient",
        "routing/balanced.py",
        "gates_TE = self.gates(scores_TE)",
        "gates_TE = self.gates(detached_TE)",
        "routing/test_every_router.py -k base",
    ),
    Fault(
        "Switch's gate has no gradient",
        "routing/switch.py",
        "weight, expert_index = probabilities_TE.max(-1)",
        "weight, expert_index = probabilities_TE.detach().max(-1)",
        "routing/test_every_router.py -k switch",
    ),
    Fault(
        "BASE's prices are a sum over groups",
        "routing/balanced.py",
        'self.prices.copy_(sums["prices"] / sums["groups"])',
        'self.prices.copy_(sums["prices"])',
        "routing/test_prices_between_steps.py",
    ),
    Fault(
        "what a router has seen of a step is not reset",
        "module.py",
        "        self._router_sums = {}\n\n    def configure",
        "\n    def configure",
        "test_training.py",
    ),
    Fault(
        "routers learn of their own rank alone",
        "module.py",
        "router.end_step({name: reduced[layer, name] for name in sums})",
        "router.end_step(sums)",
        "distributed/test_gradient_audit.py",
    ),
    Fault(
        "a forward pass moves the bias, so that recomputation counts twice",
        "routing/loss_free.py",
        "        detached_TE = gates_TE.detach()\n",
        "        detached_TE = gates_TE.detach()\n        self.bias_steps[0] += self.training\n",
        "distributed/test_gradient_audit.py -k loss_free",
    ),
    Fault(
        "recomputation counts twice in other people's models",
        "drop_in.py",
        "if torch._C._current_graph_task_id() != -1:",
        "if False:",
        "library/test_drop_in.py",
    ),
    Fault(
        "BASE is balanced in evaluation",
        "routing/balanced.py",
        'balances = self.training or self.evaluation_mode == "balanced"',
        "balances = True",
        "routing/test_base_router.py",
    ),
    Fault(
        "BASE balances all groups together",
        "routing/balanced.py",
        "balanced_assignments(groups.split(scores_TE), ",
        "balanced_assignments((scores_TE,), ",
        "routing/test_base_router.py",
    ),
    Fault(
        "the routing group is one sequence, whatever is configured",
        "module.py",
        "            routing_group=routing_group,\n",
        "            routing_group=1,\n",
        "test_measurements.py",
    ),
    Fault(
        "padding is routed and counted",
        "module.py",
        'output = self._forward[0](batch["input_ids"], valid_or_none(batch), document)',
        'output = self._forward[0](batch["input_ids"], None, document)',
        "test_options.py",
    ),
    Fault(
        "noise is the same at every step",
        "routing/noise.py",
        "_mix(torch.tensor(step + 1, device=device)) * 3",
        "0",
        "routing/test_noise.py",
    ),
    Fault(
        "every epoch has the same order",
        "data/order.py",
        "np.random.SeedSequence([seed, epoch])",
        "np.random.SeedSequence([seed])",
        "data/test_order.py",
    ),
    Fault(
        "all ranks read the same sequences",
        "data/order.py",
        "first = consumed + self.rank * self.micro_batch",
        "first = consumed",
        "data/test_order.py",
    ),
    Fault(
        "a resumed run is a micro batch ahead",
        "data/loader.py",
        "self._consumed = self._resume = state_dict[SEQUENCES_CONSUMED]",
        "self._consumed = self._resume = state_dict[SEQUENCES_CONSUMED] + self.batch_sampler.consumed_at_once",
        "data/test_datamodule.py data/test_loader.py",
    ),
    Fault(
        "the fingerprint of batches is that of the first rank",
        "callbacks/certificate.py",
        "parts = over_ranks((self.total, self.sequences))\n",
        "parts = over_ranks((self.total, self.sequences))[:1]\n",
        "distributed/test_world_size_changes_nothing.py",
    ),
    Fault(
        "the fingerprint of batches does not know the order of steps",
        "callbacks/certificate.py",
        'f"{step}:{slot}:".encode()',
        'f"{slot}:".encode()',
        "callbacks/test_certificate.py",
    ),
    Fault(
        "the newest checkpoint is used unseen",
        "resume.py",
        "        reason = verify(path)\n",
        "        reason = None\n",
        "faults/test_interruption.py -k damaged",
    ),
    Fault(
        "a damaged checkpoint is loaded",
        "checkpoint/together.py",
        "        if problem:\n",
        "        if False:\n",
        "test_checkpoint.py",
    ),
    Fault(
        "an error of one rank in a save is its own",
        "checkpoint/together.py",
        "over_ranks((value, problem))",
        "[(value, problem)]",
        "test_checkpoint.py -k together",
    ),
    Fault(
        "experts of a part are taken from its end",
        "checkpoint/load.py",
        "held[max(wanted.start - start, 0) : max(wanted.stop - start, 0)]",
        "held[max(wanted.start - start, 0) :]",
        "test_checkpoint.py",
    ),
    Fault(
        "rows written since a checkpoint stay",
        "run_directory.py",
        "os.truncate(path, sizes[path.name])",
        "pass",
        "faults/test_kills_within_a_run.py -k no_row",
    ),
    Fault(
        "a resumed run does not validate first",
        "callbacks/saving.py",
        "return trainer.global_step * trainer.accumulate_grad_batches % every == 0",
        "return False",
        "faults/test_kills_within_a_run.py -k no_row",
    ),
    Fault(
        "an owner on another host does not count",
        "claim.py",
        "        if path.stat().st_mtime_ns != last:\n            return True\n",
        "        if path.stat().st_mtime_ns != last:\n            return False\n",
        "faults/test_one_command_at_a_time.py -k another_host",
    ),
    Fault(
        "routers learn at everyone's rate",
        "module.py",
        '"lr": rate * options["router_learning_rate_factor"]',
        '"lr": rate',
        "test_training.py",
    ),
    Fault(
        "a claim holds by its mean alone",
        "claims/verdict.py",
        "if found.known and found.high < limit:",
        "if found.known and found.mean < limit:",
        "claims/test_verdicts.py",
    ),
    Fault(
        "runs of other batches are paired",
        "claims/studies.py",
        'names = ["batch_fingerprint", "steps"]',
        'names = ["steps"]',
        "claims/test_verdicts.py",
    ),
    Fault(
        "norms decay",
        "module.py",
        "kept if parameter.ndim < 2 or id(parameter) in embeddings else decayed",
        "kept if id(parameter) in embeddings else decayed",
        "test_training.py",
    ),
    Fault(
        "the learning rate does not warm up",
        "module.py",
        "        if step < warmup:\n",
        "        if step < 0:\n",
        "test_training.py",
    ),
    Fault(
        "a router's draws shift the weights of other modules",
        "model.py",
        'digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()',
        'digest = hashlib.sha256(f"{seed}:{len(list(model.parameters()))}:{name}".encode()).digest()',
        "test_model.py -k initial_weights",
    ),
    Fault(
        "products of grouped experts cost nothing",
        "callbacks/flops.py",
        "return 2 * a_shape[0] * b_shape[-2] * b_shape[-1]",
        "return 0",
        "callbacks/test_flops.py",
    ),
    Fault(
        "the backward pass of fused experts costs as much as the forward pass",
        "moe/products.py",
        "return 8 * x_shape[0] * x_shape[1] * inner_shape[1]",
        "return 4 * x_shape[0] * x_shape[1] * inner_shape[1]",
        "callbacks/test_flops.py",
    ),
    Fault(
        "a token's outputs are added without their gates",
        "moe/rows.py",
        "weights = None if weight is None else weight.to(rows_AD.dtype)[position]",
        "weights = None",
        "moe/test_sparse_layer.py",
    ),
    Fault(
        "a leak in training is looked for in evaluation",
        "metrics/causality.py",
        "copied = copy.deepcopy(router).train(training)",
        "copied = copy.deepcopy(router).train(False)",
        "metrics/test_causality.py",
    ),
    Fault(
        "only neighbouring experts are active together",
        "metrics/specialization.py",
        "pairs_EE += member_BE.T @ member_BE",
        "pairs_EE += (member_BE.T @ member_BE).tril(1).triu(-1)",
        "metrics/test_specialization.py",
    ),
    Fault(
        "the report ranks arms that look ahead",
        "report/answer.py",
        "if i != other and both and comparison.arms[i].causal and",
        "if i != other and both and",
        "report/test_answer.py",
    ),
    Fault(
        "the report forgets how many arms it compares",
        "report/answer.py",
        "corrected = iter(holm(known))",
        "corrected = iter(known)",
        "report/test_answer.py",
    ),
    Fault(
        "the report compares runs on other batches",
        "report/fairness.py",
        'BY_SEED = ("batch_fingerprint", "initial_weights_fingerprint")',
        'BY_SEED = ("initial_weights_fingerprint",)',
        "report/test_fairness.py",
    ),
    Fault(
        "a mistake in the last arm of a sweep shows when its turn has come",
        "sweep.py",
        "            checked, plain, run = check_job(config, overrides)\n",
        "            plain, run = {}, RunDirectory(sweep / str(len(jobs)))\n"
        "            checked = corpora[0] if jobs else check_job(config, overrides)[0]\n",
        "test_bad_input.py -k sweep",
    ),
    Fault(
        "TensorBoard has scalars of every layer",
        "callbacks/tensorboard.py",
        '/mean" not in values',
        '/mean" in values',
        "tensorboard/test_events.py -k mean_and_max",
    ),
    Fault(
        "tokens that arrive are not sorted by expert",
        "moe/dispatch.py",
        "return permute(arrived_MD, self._order, self._back)",
        "return arrived_MD",
        "moe/test_sharded_layer.py",
    ),
    Fault(
        "counts are left out where there is padding",
        "moe/layer.py",
        "same_sizes=same_sizes and self.training)",
        "same_sizes=True)",
        "moe/test_sharded_layer.py",
    ),
    Fault(
        "gradients of experts are divided by the copies, not the ranks",
        "distributed/expert_parallel.py",
        "parameter.grad /= self.world_size",
        "parameter.grad /= dist.get_world_size(group)",
        "distributed/test_parity.py",
    ),
    Fault(
        "copies of an expert drift apart",
        "distributed/expert_parallel.py",
        "if dist.get_world_size(group) > 1:",
        "if False:",
        "distributed/test_parity.py",
    ),
    Fault(
        "the clip norm leaves out the experts of other ranks",
        "gradients.py",
        "            dist.all_reduce(square, group=group)\n",
        "            pass\n",
        "distributed/test_parity.py",
    ),
    Fault(
        "moments of sharded experts are not loaded",
        "distributed/expert_parallel.py",
        "i: {key: slice_like(parameters[i], value) for key, value in moments.items()}",
        "i: {key: slice_like(parameters[i], value) * 0 for key, value in moments.items()}",
        "distributed/test_moving.py",
    ),
]
