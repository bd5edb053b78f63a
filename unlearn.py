"""Stage 2: make a trained model stop generating a class or a style.

    python unlearn.py --method dimum --cls 1                     # DiMUM: memorise another class in place of "square"
    python unlearn.py --method salun --cls square                # names work as well as numbers
    python unlearn.py --method dimum --style sketch              # a style
    python unlearn.py --method sfron --cls 1 --eval-every 25     # follow the FID on the way
    python unlearn.py --method dimum --cls 1 --alternative mix --alt-size 50
    python unlearn.py --method dimum --style neon --ckpt runs/shapes/dimum-cls1/model.pt       # both are forgotten then
    python unlearn.py --method dimum --cls 1 --resume            # go on after a kill

Methods: dimum (the paper), salun, sfron, esd, sa, ga, rl, finetune, swap, retrain. Leaves runs/<dataset>/<method>-cls1/
with model.pt, result.json (UA, IRA, CRA and FID before and after), log.csv and samples.png (above before, below after).
"""
import copy
import math
import time
from pathlib import Path

import torch
from torch.func import functional_call

from fid import evaluate, load_classifier, percent, protocol, reference_features, save_before_after
from model import (FACTORS, Parser, T, UNet, add_noise, antithetic_times, autocast, diffusion_loss, drop_labels, fail,
                   fingerprint, forgotten_values, guided_output, load_checkpoint, number, pick_device, run_folder,
                   run_script, sample, save_checkpoint, save_plot, shipped, to_uint8, write_csv, write_json)
from train_ddpm import (BROKEN, DEFAULTS as PRETRAIN, Loop, common_flags, dataset_flag, exclude, find_forgotten,
                        find_value, get_batch, having, learning_rate, load_data, read_image, same_data, train)

# cifar10: each method's own paper or public configuration. small: found for the small network on shapes (and used for
# fashion). `weight` multiplies the term named in the method's docstring.
DEFAULTS = {
    "cifar10": {
        "dimum": dict(steps=10000, batch_size=128, lr=1e-4, weight=1.0),
        "salun": dict(steps=1000, batch_size=128, lr=1e-4, weight=1e-3),
        "sfron": dict(steps=150, batch_size=128, lr=1e-4, weight=10.0),
        "esd": dict(steps=1000, batch_size=128, lr=1e-5, weight=1.0),
        "sa": dict(steps=20000, batch_size=128, lr=1e-4, weight=10.0),
        "ga": dict(steps=1000, batch_size=128, lr=1e-4, weight=0.05),
        "rl": dict(steps=1000, batch_size=128, lr=1e-4, weight=1e-3),
        "finetune": dict(steps=1000, batch_size=128, lr=1e-4, weight=1.0),
        "swap": dict(steps=0, batch_size=128, lr=1e-4, weight=1.0),
        "retrain": dict(steps=800000, batch_size=128, lr=2e-4, weight=1.0),
    },
    "small": {
        # dimum: after 150 steps UA is 100 %, but DiMRA brought back up to 15 % of a class; after 300 none of five.
        "dimum": dict(steps=300, batch_size=32, lr=1e-3, weight=1.0),
        "salun": dict(steps=200, batch_size=32, lr=3e-4, weight=1e-3),
        # sfron: its retain steps bring a part back as the strength falls, and after 100 steps often most of it.
        "sfron": dict(steps=200, batch_size=32, lr=3e-4, weight=10.0),
        "esd": dict(steps=200, batch_size=32, lr=3e-4, weight=1.0),
        "sa": dict(steps=200, batch_size=32, lr=1e-3, weight=0.01),    # 10, the paper's, let nothing move here
        # ga: 0.3 left UA at 0 %, 1.0 destroyed the retained classes.
        "ga": dict(steps=100, batch_size=32, lr=3e-4, weight=0.6),
        "rl": dict(steps=200, batch_size=32, lr=3e-4, weight=1e-3),
        "finetune": dict(steps=200, batch_size=32, lr=3e-4, weight=1.0),
        "swap": dict(steps=0, batch_size=32, lr=3e-4, weight=1.0),
        "retrain": dict(steps=4000, batch_size=32, lr=2e-3, weight=1.0),
    },
}


# ---- the task: what to forget, what to keep, and what to learn instead -----------------------------------------

class Task:
    """The data of one unlearning run, with one method per kind of batch: x (n, C, H, W) in [-1, 1] and y (n, F).

    factor, values: what is to be forgotten now. earlier: {factor: [value, ...]} that the model has forgotten before;
    no image of these is ever drawn.
    """

    def __init__(self, images, y, names, factor, values, batch_size, weight, flip=False, earlier=None):
        earlier = earlier or {}
        self.gone = {**earlier, factor: sorted({*values, *earlier.get(factor, [])})}
        self.retain_set = exclude(images, y, self.gone)
        images, y = exclude(images, y, earlier)
        gone = having(y, {factor: values})
        self.forget_set = images[gone], y[gone]
        self.factor, self.values, self.n, self.weight, self.flip = factor, values, batch_size, weight, flip
        self.substitute = next_value(self.gone[factor], len(names[factor]))
        self.pixels = images[0].numel()            # C*H*W: the public code sums over pixels where we average
        self.alternative_set = self.mask = self.frozen = self.fisher = self.replay_set = None
        self.inverters, self.inverter_steps, self.images_of, self.n_inverters = None, None, None, 0
        self.step, self.progress = 0, 0.0          # progress: 0 at the first step, 1 after the last

    def retain(self, n=None):
        return get_batch(*self.retain_set, n or self.n, self.flip)

    def forget(self, n=None):
        return get_batch(*self.forget_set, n or self.n, self.flip)

    def alternative(self, n=None):
        return get_batch(*self.alternative_set, n or self.n)

    def replay(self):
        return get_batch(*self.replay_set, self.n)

    def replaced(self, y):
        """y with the forgotten value replaced by the next one: y[c_f -> c']."""
        y = y.clone()
        y[:, self.factor] = self.substitute
        return y


def next_value(values, count):
    """The first value after the first forgotten one, (c_f + 1) mod K as in SalUn, that is not itself forgotten."""
    return next(v % count for v in range(values[0] + 1, values[0] + count + 1) if v % count not in values)


def alternative_data(spec, size, images, y, names, factor, values):
    """What DiMUM memorises: images uint8 (N, C, H, W) and labels (N, F) *with a forgotten value in them*.

    images, y: the retained data, so that no image of a forgotten value can be among them. spec: "class:K" (images of
    one other value of the same factor, by number or name, all else equal), "mix" (of all other values), "image:PATH"
    (one picture), "noise". size: a fixed random subset of so many images. That the other factor stays as it is is our
    reading of the paper.
    """
    kind, _, what = spec.partition(":")
    if kind == "class":
        value = find_value(what, names[factor], "alternative class:")
        if value in values:
            fail(f"--alternative {spec} is what is to be forgotten; choose another value, such as "
                 f"class:{next_value(values, len(names[factor]))}")
        index = y[:, factor] == value
        images, y = images[index], y[index]
    elif kind == "image":
        try:
            picture = read_image(what, images.shape[2], "L" if images.shape[1] == 1 else "RGB")
        except BROKEN as e:
            fail(f"--alternative {spec}: the picture cannot be read ({e}); give the path of a PNG or JPEG file")
        y = torch.unique(y, dim=0)
        images = picture.to(images.device).expand(len(y), -1, -1, -1)
    elif kind == "noise":
        images = torch.randint(0, 256, images[:1000].shape, dtype=torch.uint8, device=images.device)
        y = y[torch.randint(len(y), (len(images),), device=y.device)]
    elif kind != "mix":
        fail(f"--alternative {spec} is not one of: class:K, mix, image:PATH, noise")
    if not len(y):
        fail(f"--alternative {spec} has no images; choose another")
    if size and size < len(y):
        index = torch.randperm(len(y), device=y.device)[:size]
        images, y = images[index], y[index]
    y = y.clone()
    y[:, factor] = torch.tensor(values, device=y.device)[torch.arange(len(y), device=y.device) % len(values)]
    return images, y


# ---- what a method prepares before its first step -------------------------------------------------------------

def guided_gradients(model, batches, guidance=2.0):
    """Yield, for each batch (x0, y), the gradients of the summed-pixel loss of the *guided* output, clipped to norm 1,
    in the order of model.parameters(). Network in eval mode. Source: generate_mask and generate_fisher of the public
    SalUn and SFRon code, which both do it this way."""
    params = list(model.parameters())
    model.eval()
    for x0, y in batches:
        t = antithetic_times(len(x0), x0.device)
        x_t, target = add_noise(model, x0, t, torch.randn_like(x0))
        loss = (guided_output(model, x_t, t, y, guidance) - target).square().sum((1, 2, 3)).mean()
        model.zero_grad(set_to_none=False)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        yield [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in params]
    model.zero_grad(set_to_none=True)
    model.train()


def salun_mask(model, task, batches=40):
    """SalUn's saliency mask: True for the half of all weights whose gradients of the forget loss, summed over batches
    with their signs, are largest in magnitude. A list of bool tensors in the order of model.parameters().

    Source: 2310.12508 equation 4 with the threshold at the median, and generate_mask of OPTML-Group/Unlearn-Saliency.
    """
    total = [0] * len(list(model.parameters()))
    for grads in guided_gradients(model, (task.forget() for _ in range(batches))):
        total = [a + g for a, g in zip(total, grads)]
    flat = torch.cat([g.abs().flatten() for g in total])
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.argsort(descending=True, stable=True)[:len(flat) // 2]] = True
    return [m.view_as(g) for m, g in zip(mask.split([g.numel() for g in total]), total)]


def sfron_mask(model, task, batches=40):
    """SFRon's mask: weights whose diagonal Fisher for forget data is at least that for retained data.

    Fisher: mean squared batch gradients. Source: 2409.19732 section 4, and generate_fisher(_mask) of
    K1nght/Unified-Unlearning-w-Remain-Geometry, threshold 1.
    """
    fisher = []
    for draw in (task.forget, task.retain):
        total = [0] * len(list(model.parameters()))
        for grads in guided_gradients(model, (draw() for _ in range(batches))):
            total = [a + g.square() / batches for a, g in zip(total, grads)]
        fisher.append(total)
    return [(f + 1e-15) / (r + 1e-15) >= 1 for f, r in zip(*fisher)]


def sa_fisher(model, x0, y, times=10):
    """Selective Amnesia's diagonal Fisher information: for each example (x0 (N, C, H, W), y (N, F)) the gradient of its
    summed-pixel loss, summed over timesteps, squared; then the mean over examples. A list like model.parameters().

    Source: 2305.10120 and save_fim of clear-nus/selective-amnesia. There all 1,000 timesteps are taken; here `times` of
    them at random, and the sum is scaled by 1,000/times. Measured on the shipped model, six examples, two draws:
    ten have a rank correlation of 0.95 with all of them and a sum 1.0 and 1.8 times as large, in 1/80 of the time; a
    hundred 0.99 and 1.01, in 1/8.
    """
    params = list(model.parameters())
    model.eval()
    total = [torch.zeros_like(p) for p in params]
    for x, label in zip(x0, y):
        x, label = x.expand(times, -1, -1, -1), label.expand(times, -1)
        t = torch.randperm(T, device=x.device)[:times]
        x_t, target = add_noise(model, x, t, torch.randn_like(x))
        with autocast(x.device):
            out = model(x_t, t, label)
        loss = (out.float() - target).square().sum() * (T / times)
        for a, g in zip(total, torch.autograd.grad(loss, params, allow_unused=True)):
            if g is not None:
                a += g.square() / len(x0)
    model.train()
    return total


def prepare_salun(model, task):
    task.mask = salun_mask(model, task)


def prepare_sfron(model, task):
    task.mask = sfron_mask(model, task)


# Found on shapes, class 1, seed 0, with 4 inverters and 300 steps. Ten images and 200 steps on the label embedding then
# bring back 38 % of the squares; with a life of 60 steps it was 60 %, and without inverters 98 %, after 150 steps of
# unlearning as after 300. On class 4, which had no part in that choice, 43 % instead of 95 to 100. DiMUM's default is
# the paper's: for the style "sketch" that attack finds nothing even without inverters, and with them the FID rose by
# 17 %.
INVERTER_RATE, INVERTER_LIFE, INVERTER_NOISE = 0.05, 150, 0.3


def prepare_dimum(model, task):
    """The label embeddings of the inverters, task.n_inverters for each forgotten value (none in the paper's DiMUM), and
    the images of every value of the factor, those of the alternative for a value that was forgotten now or earlier."""
    if task.n_inverters:
        rows = model.label_embs[task.factor].weight[task.values].detach().repeat_interleave(task.n_inverters, 0)
        rows = rows + INVERTER_NOISE * torch.randn_like(rows)
        task.inverters = torch.nn.Embedding.from_pretrained(rows, freeze=False)
        task.inverter_steps = torch.optim.Adam(task.inverters.parameters(), INVERTER_RATE, betas=(0.9, 0.99))
        images, y = (torch.cat(part) for part in zip(task.retain_set, task.alternative_set))
        values = y[:, task.factor]
        task.images_of = {v: (images[values == v], y[values == v]) for v in values.unique().tolist()}


def inverted_loss(model, task, rows, row, x0, y):
    """Mean diffusion loss of x0 (B, C, H, W) with labels y (B, F), where rows[row], of rows (R, D) and row (B,), stands
    in place of the embedding of the factor that is unlearned in."""
    table, y = model.label_embs[task.factor].weight, y.clone()
    y[:, task.factor] = len(table) + row
    t = antithetic_times(len(x0), x0.device)
    x_t, target = add_noise(model, x0, t, torch.randn_like(x0))
    longer = {f"label_embs.{task.factor}.weight": torch.cat([table, rows])}
    with autocast(x0.device):
        out = functional_call(model, longer, (x_t, t, y))
    return (out.float() - target).square().mean()


def move_inverters(model, task):
    """One step of Adam of every inverter, down the loss of forget images. In turn, one of them starts anew near the
    forgotten value's embedding, so that young and old ones are there at any time."""
    rows = task.inverters.weight
    x0, y = task.forget(max(task.n // 2, 1))
    values = torch.tensor(task.values, device=y.device)
    mine = (y[:, task.factor, None] == values).int().argmax(1) * task.n_inverters       # each looks for its own value
    row = mine + torch.arange(len(y), device=y.device) % task.n_inverters
    rows.grad, = torch.autograd.grad(inverted_loss(model, task, rows, row, x0, y), rows)
    task.inverter_steps.step()
    k, due = divmod(task.step * task.n_inverters, INVERTER_LIFE)
    if due < task.n_inverters:
        anew = slice(k % task.n_inverters, None, task.n_inverters)
        with torch.no_grad():
            start = model.label_embs[task.factor].weight[task.values]
            rows[anew] = start + INVERTER_NOISE * torch.randn_like(start)
            for moment in ("exp_avg", "exp_avg_sq"):
                task.inverter_steps.state[rows][moment][anew] = 0.0


def blocked_loss(model, task):
    """Mean diffusion loss, at the embedding of each inverter, of what that place should draw: images of the value whose
    own embedding is nearest, the alternative where that is a forgotten one. (The alternative everywhere was tried: an
    inverter that looks for squares ends among the circles, and the circles became triangles, IRA 82 %.)"""
    rows, table = task.inverters.weight.detach(), model.label_embs[task.factor].weight.detach()
    known = torch.tensor(sorted(task.images_of), device=rows.device)
    nearest = known[torch.cdist(rows, table[known]).argmin(1)].tolist()
    share = max(task.n // 2 // len(rows), 1)
    batches = [get_batch(*task.images_of[value], share) for value in nearest]
    x0, y = (torch.cat(part) for part in zip(*batches))
    return inverted_loss(model, task, rows, torch.arange(len(rows), device=y.device).repeat_interleave(share), x0, y)


def prepare_swap(model, task):
    """The label embedding of another value, copied over those of the forgotten values."""
    with torch.no_grad():
        table = model.label_embs[task.factor].weight
        table[task.values] = table[task.substitute].clone()


def prepare_esd(model, task):
    """The frozen first model, and a mask of the layers through which the label enters, as ESD-x trains only those of
    the cross-attention. (All layers at the same rate were tried: IRA 51 % at UA 87 %.)"""
    task.frozen = copy.deepcopy(model).requires_grad_(False).eval()
    task.mask = [torch.full_like(p, name.startswith("label_"), dtype=torch.bool)
                 for name, p in model.named_parameters()]


def prepare_sa(model, task, examples=50, replayed=200):
    """The first weights, samples of the retained conditions to replay, and the Fisher information of some of them."""
    task.frozen = copy.deepcopy(model).requires_grad_(False).eval()
    cells = torch.unique(task.retain_set[1], dim=0)
    y = cells.repeat_interleave(math.ceil(replayed / len(cells)), 0)
    task.replay_set = to_uint8(sample(model, y, steps=20, seed=99, label="sa: samples to replay")).to(y.device), y
    task.fisher = sa_fisher(model, *get_batch(*task.replay_set, examples))


PREPARE = {"salun": prepare_salun, "sfron": prepare_sfron, "esd": prepare_esd, "sa": prepare_sa, "swap": prepare_swap,
           "dimum": prepare_dimum}


# ---- methods: each does one step and returns its loss; update(loss) is backward, clip to norm 1, optimiser -------

def dimum(model, task, update):
    """l(D_r) + weight * l(alternative images under the forgotten label): memorise something else in its place.

    Source: Yuan et al. 2512.03564. Its full text was not at hand: that the second loss is the ordinary diffusion loss
    without label dropout is our reading of the abstract and summaries. The inverters are ours, after the adversarial
    training of AdvUnlearn (Zhang et al. 2405.15234): label embeddings that look for the forgotten images meanwhile, and
    at which something else is memorised (blocked_loss).
    """
    half = max(task.n // 2, 1)
    loss = (diffusion_loss(model, *task.retain(half)).mean()
            + task.weight * diffusion_loss(model, *task.alternative(half), p_drop=0).mean())
    if task.inverters is not None:
        move_inverters(model, task)
        loss = loss + task.weight * blocked_loss(model, task)
    return update(loss)


def rl(model, task, update, **mask):
    """MSE(network(x_t, c_f), stopgrad network(x_t, c')) on noised forget images + weight * C*H*W * l(D_r), c' the next
    value. The public code drops labels with probability 0.1 in both branches, and so does this.

    Source: saliency_unlearn with unlearn_loss "rl" in OPTML-Group/Unlearn-Saliency.
    """
    x0, y = task.forget()
    t = antithetic_times(len(x0), x0.device)
    x_t, _ = add_noise(model, x0, t, torch.randn_like(x0))
    with autocast(x0.device):
        output = model(x_t, t, drop_labels(y, model))
        with torch.no_grad():                      # the target is a constant: the other class must not move
            target = model(x_t, t, drop_labels(task.replaced(y), model))
    loss = (output.float() - target.float()).square().mean()
    return update(loss + task.weight * task.pixels * diffusion_loss(model, *task.retain()).mean(), **mask)


def salun(model, task, update):
    """rl, with every gradient outside the saliency mask set to 0 (after clipping, as in the public code).

    Source: Fan et al. 2310.12508.
    """
    return rl(model, task, update, mask=task.mask, mask_first=False)


def sfron(model, task, update):
    """A masked ascent step on the forget loss, each example weighted by 1/loss^0.5 (normalised over the batch), its
    strength falling from `weight` along a cosine; then an ordinary retain step.

    Source: Huang et al. 2409.19732; sfron_forget with "adaga" and "ron" in K1nght/Unified-Unlearning-w-Remain-Geometry.
    """
    losses = task.pixels * diffusion_loss(model, *task.forget())
    share = 1 / (losses.detach().sqrt() + 1e-8)
    strength = task.weight * 0.5 * (1 + math.cos(math.pi * task.progress))
    update(-strength * (share / share.sum() * losses).sum(), mask=task.mask, mask_first=True)
    return update(task.pixels * diffusion_loss(model, *task.retain()).mean()) / task.pixels


def ga(model, task, update):
    """l(D_r) - weight * l(D_f): gradient ascent on what is to be forgotten (standard baseline)."""
    return update(diffusion_loss(model, *task.retain()).mean()
                  - task.weight * diffusion_loss(model, *task.forget()).mean())


def finetune(model, task, update):
    """l(D_r) only: whatever is forgotten is forgotten by itself (baseline)."""
    return update(diffusion_loss(model, *task.retain()).mean())


def esd(model, task, update):
    """MSE(network(x_t, c_f), eps(null) - weight * (eps(c_f) - eps(null)) of the frozen first model) on noised forget
    images: away from the condition, as negative guidance would go. Where the network predicts v the target is the same
    mixture of v, which is the same function of x_t and eps.

    Source: Gandikota et al. 2303.07345, equation 5, with eta = weight. There x_t is sampled from the model; noised
    images of the forget set stand for it here. Only the label's own layers learn.
    """
    x0, y = task.forget()
    t = antithetic_times(len(x0), x0.device)
    x_t, _ = add_noise(model, x0, t, torch.randn_like(x0))
    target = guided_output(task.frozen, x_t, t, y, -1 - task.weight).detach()
    with autocast(x0.device):
        output = model(x_t, t, y)
    return update((output.float() - target).square().mean(), mask=task.mask, mask_first=True)


def sa(model, task, update):
    """C*H*W * (l(uniform noise images under c_f) + l(replayed samples)) + weight * sum of Fisher * (weights' change)^2,
    without label dropout.

    Source: Heng & Soh 2305.10120; train_forget of clear-nus/selective-amnesia, gamma = 1.
    """
    x0, y = task.forget()
    noise = torch.rand_like(x0) * 2 - 1
    loss = diffusion_loss(model, noise, y, p_drop=0).mean() + diffusion_loss(model, *task.replay(), p_drop=0).mean()
    weights = zip(task.fisher, model.parameters(), task.frozen.parameters())
    change = sum((f * (p - q).square()).sum() for f, p, q in weights)
    return update(task.pixels * loss + task.weight * change) / task.pixels


METHODS = {"dimum": dimum, "salun": salun, "sfron": sfron, "esd": esd, "sa": sa, "ga": ga, "rl": rl,
           "finetune": finetune, "swap": finetune}


def run_method(method, model, task, steps, lr, cosine=False, embedding_lr=1.0, **keep):
    """`steps` steps of a method from METHODS on the model, in place. Returns the finished Loop. keep: path, resume,
    settings, observe and every of Loop.

    Adam, clipping at norm 1 and no EMA, as in the public SalUn code. Its learning rate is constant; cosine lets it fall
    to 0, which undoes in few steps what a high rate costs in quality. The label embeddings learn at embedding_lr times
    that rate.
    """
    params, tables = list(model.parameters()), list(model.label_embs.parameters())
    rest = [p for name, p in model.named_parameters() if not name.startswith("label_embs")]
    optimizer = torch.optim.Adam([{"params": rest, "factor": 1.0}, {"params": tables, "factor": embedding_lr}], lr,
                                 fused=True)
    if method in PREPARE:           # before the state of an interrupted run is loaded: from the first weights
        print(f"{method}: preparing")
        PREPARE[method](model, task)

    def update(loss, mask=None, mask_first=False):
        optimizer.zero_grad(set_to_none=False)     # zeros, not None: a masked weight must see a gradient of exactly 0
        loss.backward()
        for stage in ("mask", "clip") if mask_first else ("clip", "mask"):
            if stage == "clip":
                torch.nn.utils.clip_grad_norm_(params, 1.0)
            elif mask is not None:
                for p, m in zip(params, mask):
                    p.grad.mul_(m)
        optimizer.step()
        return loss.detach()

    model.train()
    parts = {"inverters": task.inverters, "inverter_steps": task.inverter_steps} if task.inverters is not None else {}
    loop = Loop(method, steps, model=model, optimizer=optimizer, **parts, **keep)
    for step in loop:
        task.step, task.progress = step, step / steps
        for group in optimizer.param_groups:
            group["lr"] = group["factor"] * learning_rate(step, steps, lr, 0, cosine)
        loop.loss = METHODS[method](model, task, update)
    model.eval()
    return loop


# ---- command line ----------------------------------------------------------------------------------------------

def find_checkpoint(dataset):
    """The newest model pretrained here, else the shipped one."""
    trained = [p for p in Path("runs", dataset).glob("pretrain*/model.pt") if "without" not in p.parent.name]
    path = max(trained, key=lambda p: p.stat().st_mtime) if trained else shipped(f"{dataset}.pt")
    if not path.is_file():
        fail(f"there is no {dataset} model yet; run 'python train_ddpm.py --dataset {dataset}' first, or name one "
             "with --ckpt")
    return path


def show(before, after):
    """The table of metrics before and after."""
    titles = {"ua": "UA   forgotten", "ira": "IRA  same factor kept", "cra": "CRA  other factor kept"}
    for name, title in titles.items():
        print(f"{title:<24} {percent(before, name):>28} -> {percent(after, name)}")
    if before["fid"] is not None:
        print(f"{'FID  (classifier feat.)':<24} {before['fid']:>28.3f} -> {after['fid']:.3f}")


def main():
    parser = Parser(__doc__)
    dataset_flag(common_flags(parser, 240, "images per evaluation, a third of them under the forgotten condition", 20))
    group = parser.add_argument_group("unlearning")
    group.add_argument("--method", choices=[*METHODS, "retrain"], default="dimum", help="how to unlearn")
    group.add_argument("--cls", nargs="+", metavar="K", help="classes to forget, by number or name")
    group.add_argument("--style", nargs="+", metavar="K", help="styles to forget, by number or name")
    group.add_argument("--ckpt", metavar="FILE", help="the model; default the newest one here, else the shipped one")
    group.add_argument("--lambda", dest="weight", type=number(float, 0, 1e9), metavar="X", help="weight in the "
                       "method's loss: DiMUM's lambda, SalUn's alpha, SFRon's forget strength; default by method")
    group.add_argument("--alternative", metavar="WHAT", help="DiMUM memorises class:K (default the next one), mix, "
                       "image:PATH or noise")
    group.add_argument("--alt-size", type=number(int, 1), metavar="N", help="DiMUM memorises N images; default all")
    group.add_argument("--inverters", type=number(int, 0, 1000), default=0, metavar="N", help="DiMUM also memorises at "
                       "N label embeddings that look for what is forgotten; 0 is the paper's DiMUM")
    group.add_argument("--embedding-lr", type=number(float, 0, 1000), default=1.0, metavar="X", help="the label "
                       "embeddings learn at X times --lr")
    group.add_argument("--eval-every", type=number(int, 1), metavar="N", help="UA and FID every N steps, in fid.png")
    args = parser.parse_args()
    started, device = time.time(), pick_device(args.device)

    path = Path(args.ckpt) if args.ckpt else find_checkpoint(args.dataset)
    model, info = load_checkpoint(path, device)
    if info["dataset"] != args.dataset:
        fail(f"{path} was trained on {info['dataset']}, not {args.dataset}; add --dataset {info['dataset']}")
    names = info["names"]
    factor, values = find_forgotten(args, names)
    opts = dict(DEFAULTS["cifar10" if model.cfg.width >= 128 else "small"][args.method])
    flags = ("steps", "batch_size", "lr", "weight", "embedding_lr")
    opts.update({k: v for k in flags if (v := getattr(args, k)) is not None})
    torch.manual_seed(args.seed)
    earlier = forgotten_values(info)
    size = model.cfg.image_size
    images, y, found = load_data(args.dataset, "train", args.data_dir, device, size)
    if found != names:
        fail(f"{path} was trained on other classes or styles than '{args.data_dir}' holds; name its folder with "
             "--data-dir")
    task = Task(images, y, names, factor, values, opts["batch_size"], opts["weight"], flip=args.dataset == "cifar10",
                earlier=earlier)
    if not len(task.forget_set[1]) or not len(task.retain_set[1]):
        fail("nothing is left to forget or to retain; forget fewer values")
    task.n_inverters = args.inverters
    alternative = args.alternative or f"class:{task.substitute}"
    sets = [alternative_data(alternative if f == factor else f"class:{next_value(gone, len(names[f]))}", args.alt_size,
                             *task.retain_set, names, f, gone) for f, gone in task.gone.items()]
    task.alternative_set = [torch.cat(part) for part in zip(*sets)]        # of what was forgotten earlier, too
    name = f"{args.method}-{FACTORS[factor]}{'-'.join(map(str, values))}"
    name += f"-after-{path.parent.name}" if earlier else ""
    folder = run_folder(args.out, Path("runs", args.dataset, name), args.resume)
    what = ", ".join(f"{v} ({names[factor][v]})" for v in values)
    print(f"{args.method}: forget {FACTORS[factor]} {what} of {path}; {opts['steps']} steps, batch "
          f"{opts['batch_size']}, lr {opts['lr']:g}" + f", alternative {alternative}" * (args.method == "dimum"))

    classifier, accuracy = load_classifier(args.dataset, args.data_dir, device, names, size)
    real_features = reference_features(classifier, *task.retain_set)
    measure = lambda m, label, keep=False: evaluate(
        m, classifier, names, task.gone, factor, real_features, args.samples, args.sampler_steps, args.guidance,
        label=label, keep=keep)
    before, images_before, y_eval = measure(model, "before", keep=True)

    keep = dict(path=folder / "train.pt", resume=args.resume, settings={
        "dataset": args.dataset, "method": args.method, "factor": factor, "gone": task.gone, "alternative": alternative,
        "alt_size": args.alt_size, "inverters": args.inverters, "seed": args.seed, "ckpt": fingerprint(model)[:12],
        **opts})
    point = lambda step, metrics: {"step": step, "ua": metrics["ua"], "fid": metrics["fid"]}
    if args.method == "retrain":
        torch.manual_seed(args.seed)
        model = UNet(model.cfg).to(device, memory_format=torch.channels_last)
        base = PRETRAIN["paper" if model.cfg.width >= 128 else "small"]
        options = {**base, "steps": opts["steps"], "batch_size": opts["batch_size"], "lr": opts["lr"]}
        model, loop = train(model, *task.retain_set, flip=task.flip, label="retrain", **options, **keep)
    else:
        observe = lambda step: point(step, measure(model, f"step {step}")[0])
        loop = run_method(args.method, model, task, opts["steps"], opts["lr"], cosine=model.cfg.width < 128,
                          embedding_lr=opts["embedding_lr"], observe=observe, every=args.eval_every, **keep)
    after, images_after, _ = measure(model, "after", keep=True)
    curve = [point(0, before), *loop.data["curve"], point(opts["steps"], after)] if args.eval_every else []

    save_before_after(folder / "samples.png", names, task.gone, y_eval, images_before, images_after)
    forgotten = {FACTORS[f]: gone for f, gone in task.gone.items()}
    made_by = {"stage": "unlearn", "method": args.method, "from": str(path), "seed": args.seed,
               "alternative": args.alternative, "alt_size": args.alt_size, "inverters": args.inverters, **opts}
    save_checkpoint(folder / "model.pt", model, {"dataset": args.dataset, "names": names, "forgotten": forgotten,
                                                 "made_by": made_by})
    write_csv(folder / "log.csv", loop.data["log"])
    if curve:
        xs = [r["step"] for r in curve]
        save_plot(folder / "fid.png", {"FID": (xs, [r["fid"] for r in curve])},
                  f"{args.method}: FID of retained conditions", "step", "FID (classifier features)")
        write_csv(folder / "curve.csv", curve)
    write_json(folder / "result.json", {
        "stage": "unlearn", "dataset": args.dataset, "method": args.method,
        "forget": {"factor": FACTORS[factor], "values": values, "names": [names[factor][v] for v in values]},
        "all_forgotten": forgotten, "before": before, "after": after, "curve": curve, "ckpt": str(path),
        "model": fingerprint(model)[:12],
        "unlearned": made_by,
        "protocol": protocol(args.dataset, names, after, real_features, accuracy, args.sampler_steps, args.guidance,
                             1234, args.seed, device),
        "args": vars(args), "train_seconds": loop.data["seconds"],
        "seconds": round(time.time() - started, 1)})
    (folder / "train.pt").unlink()                 # the run is whole: there is nothing to resume
    show(before, after)
    if len(after["ua_of"]) > 1:
        print("UA of each: " + ", ".join(f"{name} {100 * ua:.1f} %" for name, ua in after["ua_of"].items()))
    n, m = after["ua_samples"], after["ira_samples"]
    print(f"({n} + {m} samples, {args.sampler_steps} DDIM steps, guidance {args.guidance:g}, seed {args.seed}; "
          "95 % intervals)\n"
          f"wrote {folder}/model.pt, result.json and samples.png in {time.time() - started:.0f} seconds\n"
          f"next: python attack.py {folder}{same_data(args)}")


if __name__ == "__main__":
    run_script(main)
