"""What made each table of our own pages: the toys it needs, its config, and the options of each command."""

from typing import NamedTuple

from study import RATES


class Ours(NamedTuple):
    """A table of our own pages: what scripts/make_toy.py makes for it, the config, and the options of each command.

    by: whose commands they are: compare, regime, the kind of a study, or an analysis, for which compare comes first.
    """

    toys: tuple[tuple[str, ...], ...]
    config: str
    commands: tuple[tuple[str, ...], ...] = ((),)
    by: str = "compare"


def toy(name: str, *options: str) -> tuple[str, ...]:
    """The options of scripts/make_toy.py."""
    return (name, "--out", f"toy/{name}", *options)


VISION, NLU, NLG, MINILM, SMOLLM = ((toy(name),) for name in ("vision", "nlu", "nlg", "minilm", "smollm"))
RATED = tuple(("vision", "--out", f"toy/vision-{rate}", "--rate", rate) for rate in RATES)
FIVE = "--compare.seeds=[0,1,2,3,4]"
EVERY = "--compare.starts=[pretrained,ta,tsv,wudi,swudi_a]"
FOUR, GOOD = "--compare.starts=[pretrained,ta,tsv,wudi]", "--compare.starts=[tsv,wudi]"
LONG = ("--run.name=long", "--anchors.number=48", "--anchors.steps=300")
RIDGE = ("--run.name=ridge", "--compare.starts=[swudi_a]", "--adapt.warm_start=regmean")
RIDGES = ("0", "0.01", "0.1", "1", "10", "30", "100")
GUARD = ("--run.name=guard", "--compare.seeds=[0,1,2]", EVERY)
MINILM_GUARD = ("--run.name=minilm-guard", "--compare.seeds=[0]", "--compare.starts=[tsv,wudi,swudi_a]")
MINILM_EVERY = ("--run.name=minilm-every", "--compare.seeds=[0]", "--adapt.speedup=5")
MINILM_SEARCH = (
    "--compare.search={ta: {scale: [0.1,0.15,0.2,0.25,0.3,0.35,0.4,0.5,0.6,0.8]}, "
    "wudi: {lr: [2.0e-5,1.0e-4,5.0e-4,1.0e-3,2.0e-3]}}"
)
WITHOUT_DATA = (
    "pretrained,average,ta,rws,ties,dare_ta,dare_ties,breadcrumbs,pcb,sce,tsv,dc_merge,star,cart,iso_c,iso_cts,wudi,"
    "wudi_exact,swudi,swudi_a,actmat,tact,ace,opcm,ta+svc"
)
SMOLLM_GUARD = ("--run.name=smollm-guard", "--compare.seeds=[0]")
SMOLLM_EVERY = (
    "--run.name=smollm-every",
    "--compare.seeds=[0]",
    "--adapt.rest=pretrained",
    "--eval.limit=100",
    "--run.workers=1",
    f"--compare.starts=[{WITHOUT_DATA}]",
)
CUT = ("--adapt.label=cut", "--compare.search={fda: {blend: [0.2,0.4,0.6,0.8,1.0]}}")
MANY = (
    "--compare.starts=[pretrained,average,ta,rws,ties,dare_ta,dare_ties,breadcrumbs,pcb,sce,varm,consensus_ta,tsv,dc_merge,"
    "star,cart,iso_c,iso_cts,wudi,wudi_exact,swudi,swudi_a,optmerge,actmat,tact,ace,doge_ta,opcm,widen,"
    "pact+wudi,pact+swudi_a,ta+svc,tsv+svc,fisher,regmean,regmean_pp,adamerging,prodistill,fw_merging,"
    "expert_merging]"
)
MANY_WITHOUT_DATA = (
    "--compare.starts=[pretrained,average,ta,rws,ties,dare_ta,dare_ties,breadcrumbs,pcb,sce,varm,consensus_ta,tsv,dc_merge,"
    "star,cart,iso_c,iso_cts,wudi,wudi_exact,swudi,swudi_a,optmerge,actmat,tact,ace,doge_ta,opcm,widen,ta+svc,tsv+svc]"
)
MERGES = ("--run.name=merges", "--compare.inits=[]")
MINILM_MERGES = ("--run.name=minilm-merges", "--compare.inits=[]")
WITH_SCORES = {"compare": "", "regime": "regime"}  # whose file is results.json, and where in the run's folder
DEMOS = tuple(f"{folder}/results/demo.json" for folder in ("Vision", "NLU", "NLG"))
OURS = {
    DEMOS[0]: Ours(VISION, "vision/toy"),
    DEMOS[1]: Ours(NLU, "nlu/toy"),
    DEMOS[2]: Ours(NLG, "nlg/toy"),
    "Vision/results/regime.json": Ours(VISION, "vision/toy", by="regime"),
    "Vision/results/map.json": Ours(
        VISION,
        "vision/toy",
        (("--run.name=map", "--compare.search={ta: {scale: {map: {low: 0, high: 0.6, samples: 60}}}}"),),
        "regime",
    ),
    "Vision/results/toy.json": Ours(VISION, "vision/toy", (("--run.name=toy", EVERY, FIVE),)),
    "Vision/results/long.json": Ours(
        VISION,
        "vision/toy",
        (
            (*LONG, FOUR),
            (*LONG, GOOD, "--adapt.epochs=5", "--adapt.label=e5"),
            (*LONG, GOOD, "--adapt.epochs=25", "--adapt.label=e25"),
            (*LONG, GOOD, "--adapt.lr=1e-3", "--adapt.label=lr1e-3"),
        ),
    ),
    "Vision/results/cut.json": Ours(
        VISION,
        "vision/toy",
        (GUARD, (*GUARD, *CUT)),
    ),
    "Vision/results/weights.json": Ours(
        VISION,
        "vision/toy",
        (("--run.name=weights-size", "--anchors.weights=size", "--compare.seeds=[0,1,2]", FOUR),),
    ),
    "Vision/results/ridge.json": Ours(
        VISION,
        "vision/toy",
        (
            *((*RIDGE, "--adapt.epochs=0", f"--adapt.ridge={r}", f"--adapt.label=ridge {r}") for r in RIDGES),
            (*RIDGE, "--adapt.epochs=100", "--adapt.ridge=1", "--adapt.label=ridge 1 epochs"),
        ),
    ),
    "Vision/results/studies/real.json": Ours(VISION, "vision/toy", ((FOUR,),), "real"),
    "Vision/results/studies/cost.json": Ours(
        VISION,
        "vision/toy",
        (("--run.name=cost", "--compare.starts=[pretrained,ta,tsv,wudi,swudi_a,regmean_pp,prodistill]"),),
        "cost",
    ),
    "Vision/results/studies/methods.json": Ours(
        VISION, "vision/toy", (("--run.name=methods", "--run.workers=1", "--compare.seeds=[0,1,2]", MANY),), "methods"
    ),
    "Vision/results/analyses/residual.json": Ours(VISION, "vision/toy", ((*MERGES, MANY_WITHOUT_DATA),), "residual"),
    "Vision/results/studies/rates.json": Ours((*VISION, *RATED), "vision/toy", ((FOUR,),), "rates"),
    "Vision/results/studies/ablations.json": Ours(VISION, "vision/toy", by="ablations"),
    "Vision/results/studies/tasks.json": Ours(VISION, "vision/toy", ((FOUR,),), "tasks"),
    "NLU/results/minilm_regime.json": Ours(MINILM, "nlu/minilm", ((MINILM_SEARCH,),), "regime"),
    "NLU/results/minilm.json": Ours(MINILM, "nlu/minilm", (("--compare.seeds=[0,1,2]",),)),
    "NLU/results/cut.json": Ours(MINILM, "nlu/minilm", (MINILM_GUARD, (*MINILM_GUARD, *CUT))),
    "NLU/results/studies/methods.json": Ours(
        MINILM,
        "nlu/minilm",
        (
            (
                *MINILM_EVERY,
                "--run.workers=1",
                f"--compare.starts=[{WITHOUT_DATA},regmean,regmean_pp,prodistill]",
            ),
        ),
        "methods",
    ),
    "NLU/results/analyses/residual.json": Ours(
        MINILM, "nlu/minilm", ((*MINILM_MERGES, f"--compare.starts=[{WITHOUT_DATA}]"),), "residual"
    ),
    "NLU/results/six.json": Ours(
        MINILM,
        "nlu/minilm",
        (
            (
                *MINILM_EVERY,
                "--eval.tests={similarity: []}",
                f"--compare.starts=[{WITHOUT_DATA}]",
            ),
        ),
    ),
    "NLG/results/smollm_regime.json": Ours(
        SMOLLM, "nlg/smollm", (("--compare.search={ta: {scale: [0.6,0.8,1.0]}}",),), "regime"
    ),
    "NLG/results/smollm.json": Ours(SMOLLM, "nlg/smollm", ((FIVE,),)),
    "NLG/results/smollm_swudi.json": Ours(
        SMOLLM,
        "nlg/smollm",
        (
            (*SMOLLM_GUARD, "--compare.starts=[pretrained,swudi_a]"),
            (*SMOLLM_GUARD, "--compare.starts=[swudi_a]", "--adapt.rest=pretrained", "--adapt.label=mlp"),
        ),
    ),
    "NLG/results/smollm_swudi_mlp.json": Ours(
        SMOLLM,
        "nlg/smollm",
        (
            (
                "--run.name=smollm-swudi",
                "--compare.seeds=[0,1,2]",
                "--compare.starts=[swudi_a]",
                "--adapt.rest=pretrained",
                "--adapt.label=mlp",
            ),
        ),
    ),
    "NLG/results/studies/methods.json": Ours(SMOLLM, "nlg/smollm", (SMOLLM_EVERY,), "methods"),
    "NLG/results/every.json": Ours(SMOLLM, "nlg/smollm", (SMOLLM_EVERY,)),
    "NLG/results/smollm_layer.json": Ours(
        SMOLLM,
        "nlg/smollm",
        (
            (
                "--run.name=smollm-layer",
                "--run.precision=float32",
                "--anchors.part=layer",
                "--anchors.number=64",
                "--adapt.batch_size=64",
                "--compare.seeds=[0]",
                "--compare.starts=[pretrained]",
            ),
        ),
    ),
    "NLG/results/smollm_mlp.json": Ours(
        SMOLLM,
        "nlg/smollm",
        (("--run.name=smollm_mlp", "--compare.starts=[ta,tsv,wudi]", "--adapt.rest=pretrained", "--adapt.label=mlp"),),
    ),
}
