"""Write an artefact whose weights lie between those of two others: what one has learnt since, without what it forgot.

`python jobs/average_weights.py --artifact weights/tiny/dit --with runs/dit/dit --output runs/halfway`

For a model that was trained further on a part of its tasks (WiSE-FT, Wortsman et al. 2022, arXiv 2109.01903): between
two sets of weights that are near each other the loss is low all the way. `--share`: how much of the second.
"""

from __future__ import annotations

from pathlib import Path

from arlon_ray.artifact import Artifact, load_artifact, save_artifact
from jobs.command_line import InputError, existing, parser, run


def average(one: Artifact, other: Artifact, share: float, output: Path) -> Artifact:
    """(1 − share) · one + share · other. Raises InputError if they are not models of one size."""
    first, second = one.tensors(), other.tensors()
    if {name: tensor.shape for name, tensor in first.items()} != {name: t.shape for name, t in second.items()}:
        raise InputError(f"{one.path} and {other.path}: expected two artefacts of one size")
    tensors = {
        name: first[name].float().lerp(second[name].float(), share).to(second[name].dtype)
        if second[name].is_floating_point()
        else second[name]
        for name in first
    }
    parents = {**other.lineage.parents, "average_of": one.fingerprint, "and": other.fingerprint, "share": f"{share:g}"}
    return save_artifact(output, kind=other.lineage.kind, config=other.config, tensors=tensors, parents=parents)


def main() -> None:
    """Command line."""
    flags = parser(__doc__ or "", output="runs/average", config=False)
    flags.add_argument("--kind", choices=("ar", "dit", "vae"), default="dit")
    flags.add_argument("--artifact", required=True, metavar="DIR")
    flags.add_argument("--with", required=True, metavar="DIR", dest="other", help="of the same kind and size")
    flags.add_argument("--share", type=float, default=0.5, help="of the second in what is written, 0 to 1")
    arguments = flags.parse_args()
    if not 0 <= arguments.share <= 1:
        raise InputError(f"--share {arguments.share:g}: expected 0 to 1")
    one, other = (
        load_artifact(existing(path, flag), arguments.kind)
        for path, flag in ((arguments.artifact, "--artifact"), (arguments.other, "--with"))
    )
    print(average(one, other, arguments.share, Path(arguments.output).expanduser().absolute()).path)


if __name__ == "__main__":
    run(main)
