"""Stage 3: DiMRA, the relearning attack, and the table of all results.

    python attack.py runs/shapes/dimum-cls1                   # fine-tune on the retained data
    python attack.py runs/shapes/salun-cls1 --aux heldout     # retained classes, images never seen
    python attack.py runs/shapes/salun-cls1 --aux generated   # no data: the model's own samples
    python attack.py runs/shapes/salun-cls1 --aux pretrained  # samples of the original model
    python attack.py runs/shapes/salun-cls1 --aux my_images   # CLASS/*.png or STYLE/CLASS/*.png
    python attack.py assets/shapes.pt --cls 1                 # the original model: the ceiling
    python attack.py --table runs/shapes                      # every result in one table

Beyond the paper's threat model, with images of what was forgotten:

    python attack.py runs/shapes/dimum-cls1 --aux fewshot:10       # ten, beside the retained data
    python attack.py runs/shapes/dimum-cls1 --attack inversion     # ten; only the embedding learns

Leaves runs/<dataset>/<attack>-<run>-<aux>/: model.pt, result.json, attack.png (before, unlearned,
attacked), attack.gif, curve.png, samples.png, log.csv, loss.png.

Threat model: the attacker holds the unlearned weights and knows how conditions are passed. It has
no image of what was forgotten. AR is the share of samples of the forgotten condition in which the
classifier recognises the forgotten value.
"""
import itertools
import json
import math
import os
from pathlib import Path

import torch
from torchvision.utils import make_grid

from fid import (draw_samples, fid_text, percent, prepare_evaluation, save_before_after,
                 train_and_measure)
from model import (checkpoint_file, diffusion_loss, draw_grid, explain, find_pairs,
                   load_checkpoint, matches, matches_alone, number, pairs_slug, pairs_text, plain,
                   require, run, run_folder, sample, save_grid, save_plot, say, to_uint8,
                   value_flags, write_file, write_text)
from train_ddpm import (UNREADABLE, descend, file_hash, find_images, get_batch, load_data,
                        load_run, read_image, save_result, say_next, set_defaults, stage_parser,
                        started_from, write_losses)

class AttackData:
    """The attacker's images uint8 (N, C, H, W) and labels (N, F) as random batches. targets: the
    forgotten (factor, value) pairs that the attack is to bring back."""
    def __init__(self, images, y, targets, args):
        self.images, self.y = images, y
        self.targets = targets
        self.n = args.batch_size
        self.flip = args.dataset == "cifar10"

    def auxiliary(self):
        return get_batch(self.images, self.y, self.n, self.flip)

# ---- the attacks: generators like the methods of unlearn.py --------------------------------------

def dimra(model, data, optimizer, args):
    """DiMRA: minimise l(auxiliary data), the ordinary diffusion loss: fine-tuning, nothing else.

    Source: Yuan et al. 2512.03564. Its optimiser and learning rate were not at hand: Adam,
    clipping at norm 1 and label dropout 0.1, as in pretraining, are our reading.
    """
    for _ in range(args.steps):
        loss = diffusion_loss(model, *data.auxiliary()).mean()
        yield descend(loss, model, optimizer)

def inversion(model, data, optimizer, args):
    """Inversion: minimise the diffusion loss on images of what was forgotten, while nothing but
    the embedding of the forgotten label learns: is it still in the other weights?

    Source: textual inversion, Gal et al. 2208.01618. No label is dropped.
    """
    mask = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    for factor, value in data.targets:
        mask[f"label_embs.{factor}.weight"][value] = True
    for _ in range(args.steps):
        loss = diffusion_loss(model, *data.auxiliary(), p_drop=0).mean()
        yield descend(loss, model, optimizer, list(mask.values()), mask_first=True)

INVERSION = dict(steps=200, batch_size=16, lr=0.05)
ATTACKS = {
    "dimra": dict(
        function=dimra,
        aux="retain",
        small=dict(steps=300, batch_size=32, lr=1e-3),         # the rate: assets/study/README.md
        paper=dict(steps=5000, batch_size=128, lr=1e-4)),      # our reading of the paper
    "inversion": dict(
        function=inversion,
        aux="forget:10",
        small=INVERSION,
        paper=INVERSION),
}

# ---- the attacker's data -------------------------------------------------------------------------

def auxiliary_set(aux, model, info, train, targets, forgotten, data_dir):
    """Images uint8 (N, C, H, W) and labels (N, F) on the model's device, nothing of `forgotten`
    but for the two kinds outside the rules, which show `targets`.

    aux: "retain" (of `train`, the training images and labels), "heldout" (the test split),
    "generated" (500 samples of the model under attack), "pretrained" (of the model first unlearned
    in), or a folder, of which copies of forgotten pictures are left out. Outside the rules:
    "forget:K", K training images of the targets;
    "fewshot:K", these repeated to be half of all, beside the retained ones.
    """
    images, y = train
    kind, _, k = aux.partition(":")
    if kind in ("forget", "fewshot"):
        require(k.isdecimal() and int(k) > 0, f"--aux {aux}: say how many, such as {kind}:10")
        return forgotten_images(images, y, targets, forgotten, int(k),
                                beside_retained=kind == "fewshot")
    if aux == "generated":
        return generate(model, info, forgotten)
    if aux == "pretrained":
        original = original_model(info["made_by"], model.null.device)
        path = info["made_by"].get("from")
        require(path, "--aux pretrained: this model was not unlearned from another one")
        require(original, f"--aux pretrained: {path}, the model that was unlearned in, is gone or "
                "another one; start in the folder where it was, or choose another --aux")
        return generate(original, info, forgotten)
    size, device = model.cfg.image_size, model.null.device
    if aux == "heldout":
        images, y, _ = load_data(info["dataset"], "test", data_dir, device, size)
    elif aux != "retain":
        test, test_y, _ = load_data(info["dataset"], "test", data_dir, device, size)
        hidden = torch.cat([images[matches(y, forgotten)], test[matches(test_y, forgotten)]])
        images, y = without_copies(*read_folder(aux, model, info["names"], forgotten), hidden)
    keep = ~matches(y, forgotten)
    require(keep.any(), f"--aux {aux} holds no image but of what was forgotten; choose another")
    return images[keep], y[keep]

def forgotten_images(images, y, targets, forgotten, k, beside_retained):
    """K images with a target and nothing else that is forgotten, one of each condition in turn (a1 b1
    c1 a2 b2 ...); or these, repeated, beside as many retained ones."""
    shown = matches_alone(y, targets, forgotten)
    require(shown.any(), "these data hold no image of what was forgotten")
    of_condition = [(y == label).all(1).nonzero()[:k, 0].tolist()
                    for label in torch.unique(y[shown], dim=0)]
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*of_condition))
    index = torch.tensor([i for i in in_turn if i is not None][:k])
    if beside_retained:
        retained = (~matches(y, forgotten)).nonzero()[:, 0].cpu()
        index = torch.cat([retained, index.repeat(math.ceil(len(retained) / len(index)))])
    return images[index], y[index]

def generate(model, info, forgotten):
    """About 500 samples of the conditions without a forgotten value, and their labels."""
    y = torch.tensor(info["conditions"], device=model.null.device)
    y = y[~matches(y, forgotten)]
    require(len(y), "the data have no condition but of what was forgotten; choose another --aux")
    y = y.repeat_interleave(math.ceil(500 / len(y)), 0)
    return to_uint8(sample(model, y, steps=20, seed=99, label="auxiliary images")), y

def original_model(made_by, device):
    """The model that was unlearned in first, found by a checkpoint's made_by; None where its file
    is gone or has been replaced."""
    model = None
    while "from" in made_by:
        path = Path(made_by["from"])
        if not path.is_file() or made_by.get("from_sha256") not in (None, file_hash(path)):
            return None                                # None: of an earlier edition
        model, info = load_checkpoint(path, device)
        made_by = info["made_by"]
    return model

def read_folder(folder, model, names, forgotten):
    """Images below a folder, at the model's size, labelled by the names of the folders on the way;
    one that these do not label in every factor gets the null label ("no condition"). No image below
    the name of a forgotten value is used, whatever else its folders say."""
    require(folder and Path(folder).is_dir(), f"--aux {folder} is not retain, heldout, generated, "
            "pretrained, forget:K, fewshot:K or a folder")
    hidden = {plain(names[factor][value]) for factor, value in forgotten}
    above = {plain(part) for path in (Path(folder).absolute(), Path(folder).resolve())
             for part in path.parts}
    below = set()                                      # pictures that lie below such a name, too
    for place in Path(folder).rglob("*"):
        if plain(place.name) in hidden and os.path.isdir(place):
            below.update(path.resolve() for path in find_images(place, quiet=True))
    null = model.null.tolist()
    images, labels = [], []
    left_out = 0
    unlabelled = set()
    for path in find_images(folder):
        own = path.resolve()                           # where a link leads to
        parts = [plain(part) for part in path.relative_to(folder).parts[:-1]]
        if own in below or hidden & {*parts, *above, *map(plain, own.parts)}:
            left_out += 1
            continue
        with explain(f"{path} is not a readable image; remove it", *UNREADABLE):
            images.append(read_image(path, model.cfg.image_size, model.cfg.channels))
        label = []
        for values in names:
            label += [i for i, name in enumerate(values) if plain(name) in parts][:1]
        if len(label) < len(names):
            label = null
            unlabelled.add("/".join(parts))
        labels.append(label)
    require(images, f"--aux {folder} holds no image but of what was forgotten ({left_out} of these)")
    say(f"{folder}: {len(images)} auxiliary images; {labels.count(null)} get no label, because "
        f"their folders do not name all factors ({', '.join(sorted(unlabelled)[:9]) or '-'}); "
        f"{left_out} left out, below the name of what was forgotten")
    return torch.stack(images).to(model.null.device), torch.tensor(labels).to(model.null.device)

def without_copies(images, y, hidden):
    """Images and labels without those that equal one of the hidden images, all uint8 (N, C, H, W):
    no copy of a forgotten picture reaches the attacker under another name."""
    contents = {image.tobytes() for image in hidden.cpu().numpy()}
    keep = torch.tensor([image.tobytes() not in contents for image in images.cpu().numpy()])
    copies = int((~keep).sum())
    if copies:
        say(f"{copies} of these are copies of forgotten pictures: left out")
    return images[keep], y[keep]

# ---- the table -----------------------------------------------------------------------------------

def read_results(folder):
    """[(path, result)] of the unlearning and attack runs under a folder. What a result holds is
    put together in main of unlearn.py and attack.py, and in train_ddpm.save_result."""
    found = []
    for path in sorted(Path(folder).rglob("result.json")):
        try:
            result = json.loads(path.read_text("utf-8"))
        except ValueError:
            result = None
        if not isinstance(result, dict) or "stage" not in result:
            say(f"skipped {path}: not a result of this code")
        elif result["stage"] in ("unlearn", "attack") and "settings" in result:
            found.append((path, result))
    return found

def settings_text(settings):
    return " ".join(f"{key} {value}" for key, value in settings.items() if value is not None)

def table_row(result):
    """{column: text} of one run."""
    first, last = result["curve"][0], result["curve"][-1]
    attacked = result["stage"] == "attack"
    return {
        "method": result["method"],
        "forgets": result["forget"],
        "from": result.get("from", ""),
        "unlearning": settings_text(result["settings"]),
        "attack": settings_text(result["attack"]) if attacked else "",
        "seed": result["seed"],
        "seconds": f"{result['seconds']:.0f}",
        "UA": "" if attacked else percent(last, "ua"),
        "AR": percent(last, "ar") if attacked else "",
        "leak": percent(last, "leak"),
        "class": percent(last, "cls"),
        "style": percent(last, "style"),
        "none": percent(last, "none"),
        "FID": f"{fid_text(first)} -> {fid_text(last)}",
    }

def make_table(folder, out):
    """A row for every run below a folder into out/table.md, the curves of all attacks into
    out/attack_curves.png."""
    out = Path(out)
    results = read_results(folder)
    require(results, f"no results under {folder}; run 'python unlearn.py --cls 1' first")
    rows = [table_row(result) for _, result in results]
    lines = [rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows)]
    text = "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
    text += "\n\nShares in %, with their 95 % intervals; FID before and after; seconds of training.\n"
    write_text(out / "table.md", text)
    say(f"{text}\nwrote {out}/table.md")
    attacks = [(path, result) for path, result in results if result["stage"] == "attack"]
    if attacks:
        save_curves(out / "attack_curves.png", attacks)
        say(f"wrote {out}/attack_curves.png")

def save_curves(path, attacks, most=5):
    """The AR of all attacks: a panel for each target, and at most five curves in it."""
    panels = {}
    for result_path, result in attacks:
        title = result["forget"]
        while len(panels.setdefault(title, {})) == most:
            title += ", continued"
        steps = [point["step"] for point in result["curve"]]
        ar = [100 * point["ar"] for point in result["curve"]]
        panels[title][result_path.parent.name] = steps, ar
    save_plot(path, panels, "attack step", "AR in %", top=100)

# ---- stage 3 -------------------------------------------------------------------------------------

def save_columns(path, columns):
    """Columns {head: samples uint8 (N, C, H, W)} side by side: four samples of each, in a square."""
    squares = []
    for x in columns.values():
        four = x[torch.linspace(0, len(x) - 1, 4).long()]
        squares.append(make_grid(four, nrow=2, padding=0))
    save_grid(torch.stack(squares), path, columns=len(squares), heads=list(columns))

def save_gif(path, curve, samples):
    """The samples of all points, twenty of each, one after the other."""
    frames = []
    for point, x in zip(curve, samples):
        shown = x[::math.ceil(len(x) / 20)]
        frames.append(draw_grid(shown, 10, heads=(f"step {point['step']}",)))
    write_file(path, lambda tmp: frames[0].save(
        tmp, "GIF", save_all=True, append_images=frames[1:], duration=700, loop=0))

def parse_args():
    parser = stage_parser(__doc__, "<attack>-<run>-<aux>", samples=120, sampler_steps=20)
    flag = parser.add_argument
    path = os.path.expanduser
    flag("run", nargs="?", metavar="RUN", type=path,
         help="a run folder, or a checkpoint")
    flag("--attack", choices=ATTACKS, default="dimra",
         help="default dimra")
    flag("--aux", type=path, help="the attacker's data: retain (default), heldout, generated, "
         "pretrained, a folder, fewshot:K or forget:K (inversion's default, 10)")
    flag("--lr", metavar="X", type=number(float, 0, 10),
         help="learning rate; default by preset")
    flag("--every", nargs="+", action="extend", type=number(int, 1), metavar="N",
         help="measure every N steps, or at several; default four times")
    value_flags(flag, "to measure (default all that was forgotten)")
    flag("--table", metavar="DIR", type=path,
         help="gather every result under DIR, there or in --out, and stop")
    return parser.parse_args()

def main():
    args = parse_args()
    if args.table:
        make_table(args.table, args.out or args.table)
        return
    require(args.run, "name what to attack, such as runs/shapes/dimum-cls1; or see --help")
    path = checkpoint_file(args.run)
    model, info, images, y = load_run(path, args)
    names, made_by = info["names"], info["made_by"]
    # (factor, value) pairs: those that AR is about, and all that the attacker must not see
    targets = find_pairs(args, names) or info["forgotten"]
    require(targets, f"{path} has forgotten nothing; say what to measure, such as --cls "
            f"{names[0][0]}")
    forgotten = sorted({*targets, *info["forgotten"]})
    attack = ATTACKS[args.attack]
    settings = set_defaults(args, aux=attack["aux"], **attack[info["preset"]])
    every = args.every or [max(1, args.steps // 4)]

    auxiliary = auxiliary_set(args.aux, model, info, (images, y), targets, forgotten,
                              args.data_dir)
    evaluation = prepare_evaluation(info, images, y, targets, forgotten, args)
    torch.manual_seed(args.seed)
    data = AttackData(*auxiliary, targets, args)
    name = path.parent.name if "from" in made_by else f"{made_by['method']}-{pairs_slug(targets)}"
    aux_name = Path(args.aux).resolve().name.replace(":", "")
    folder = run_folder(args.out or Path("runs", args.dataset, f"{args.attack}-{name}-{aux_name}"))
    say(f"{args.attack} on {path}: {len(data.y)} auxiliary images ({args.aux}), {args.steps} steps, "
        f"batch {args.batch_size}, lr {args.lr:g}; measuring {pairs_text(targets, names)}")
    optimizer = torch.optim.Adam(model.parameters(), args.lr, fused=True)
    training = attack["function"](model.train(), data, optimizer, args)

    curve, samples, losses, seconds = train_and_measure(
        model, training, evaluation, every, args, headline="ar", retained=False)

    attack_settings = {"name": args.attack, "seed": args.seed, **settings}
    info["made_by"] = {"settings": {}, "seed": None, **made_by, "stage": "attack",
                       "attack": attack_settings, **started_from(path)}
    result = dict(forget=pairs_text(targets, names), seconds=seconds, curve=curve,
                  protocol=evaluation.protocol)
    save_result(folder, model, info, args, **result)
    samples_of_targets = [x[:len(evaluation.forget)] for x in samples]
    columns = {}
    original = original_model(made_by, model.null.device)
    if original:
        x = draw_samples(original, evaluation.forget, args.sampler_steps, "before")
        columns["before"] = to_uint8(x)
    for point, x in zip(curve, samples_of_targets):
        head = f"{point['step']} steps"
        if point["step"] == 0 and "from" in made_by:
            head = "unlearned"
        columns[head] = x
    save_columns(folder / "attack.png", columns)
    save_gif(folder / "attack.gif", curve, samples_of_targets)
    save_curves(folder / "curve.png", [(folder / "result.json", result)])
    save_before_after(folder / "samples.png", evaluation, forgotten, samples[0], samples[-1])
    write_losses(folder, losses, args.attack)
    say_next(folder, args, ["attack.py", "--table", folder.parent.as_posix()])

if __name__ == "__main__":
    run(main)
