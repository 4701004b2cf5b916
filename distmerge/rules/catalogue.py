"""stub"""

from distmerge.rules.protocol import Rule, Target


def build(name: str, target: Target) -> Rule:
    raise NotImplementedError
