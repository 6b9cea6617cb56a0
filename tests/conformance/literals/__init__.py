"""The references' samplers, one module per family of cases, with their deviations from ours as switches.

A module's `literal(recorded)` does what the released code does and must give the record; with `deviations=False` it
does what we do and must give what the engine gives. Where the two differ, the rules it names are the only reason. The
logits come from the model's own forward, not through the library's scoring or caches. `samplers.Family` says what a
module has, `samplers.Optional` what it may have.
"""

from __future__ import annotations

from tests.conformance.cases import Case
from tests.conformance.literals import (
    adablock,
    blocks,
    d3cache,
    daedal,
    dinfer,
    dkv,
    dream,
    eoser,
    fast_dllm_v2,
    fastdllmdream,
    freecache,
    freedave,
    llada,
    mdpo,
    parallel,
    pipelines,
    s2d2,
    wedlm,
)
from tests.conformance.samplers import Family, Recorded

FAMILIES: dict[str, Family] = {
    "adablock": adablock,
    "daedal": daedal,
    "llada": llada,
    "d1": llada,
    "fastdllm": llada,
    "dream": dream,
    "freedave": freedave,
    "eoser": eoser,
    "ass": eoser,
    "mdpo": mdpo,
    **dict.fromkeys(("sdar", "llada2gen", "llada21gen"), blocks),
    **dict.fromkeys(("dkvdecode", "dkvgreedy", "dkvdream"), dkv),
    "freecache": freecache,
    "dinfer": dinfer,
    "fastdllmdream": fastdllmdream,
    **dict.fromkeys(("wino", "klass", "saber", "pcsampler", "ebsampler", "learn2pd"), parallel),
    **dict.fromkeys(("d2f", "d3multiblock"), pipelines),
    "s2d2": s2d2,
    "d3cache": d3cache,
    "fastdllmv2": fast_dllm_v2,
    **dict.fromkeys(("wedlm", "wedlmblock"), wedlm),
}
"""The first word of a case's name to the module of its family."""


def family_of(case: Case) -> Family:
    """The module that knows a case's sampler."""
    return FAMILIES[case.family]


def record(case: Case) -> Recorded:
    """A sampler case in tensors."""
    return getattr(family_of(case), "record", Recorded.of)(case)
