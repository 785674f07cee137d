r"""SMOOTHIE: probe many settings for the smoothness of their loss, and train only the best few.

Hyper-parameters change how curved the loss is before they change anything that can be scored. So look at the curvature
after next to no training: draw N1 settings at random, probe each (one epoch of a net, a closed form of naive Bayes),
and give the full training to the N2 with the best score S. Nothing is learnt from one setting for the next; a new batch
is drawn when the finalists are used up, unless another sampler is to go on from them.

================  =======================  ===============================================
paper             here                     range, default
================  =======================  ===============================================
N1                ``n_candidates``         >= 1; 30
N2                ``n_finalists``          [1, N1]; 5
S                 ``probe(params)``        finite; see `planish.tune.smoothness`
================  =======================  ===============================================

Differs from the paper: finalists are judged by whatever the study's objective is, which should be a validation score
(the authors' program judges them by the test score); candidates within a batch are distinct; a score of 0 (dead nets)
ranks last instead of being a value, and ties are in random order.
When to use: where a probe is far cheaper than a training. Measure whether S orders your settings at all: on many data
it does not, and then the finalists are a random choice. See ``docs/papers/smoothie_hpo.md``.

Reference:
    Yedida and Menzies, Is Hyper-Parameter Optimization Different for Software Analytics?, 2024.
    https://arxiv.org/abs/2401.09622
"""

import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import numpy as np

from planish._support import bad, require, warn_once
from planish.tune.ranking import KEEPS, Keep, ranked

if TYPE_CHECKING:
    import optuna
else:
    optuna = require("optuna", "optuna", "planish.tune.SmoothieSampler")

__all__ = ["SmoothieSampler"]

Space = dict[str, optuna.distributions.BaseDistribution]
_CLAIM = "smoothie:claim"
_ATTEMPTS = 20


class SmoothieSampler(optuna.samplers.BaseSampler):
    """Hand out, of every batch of random settings, those whose probe scores best.

    Scores and claims live in the study's storage: workers share the probing of a batch, no finalist is handed out
    twice, and a study that was killed goes on without a probe run twice. A finalist whose trial failed is handed out
    once more; so is that of a killed worker once its trial is marked as failed (`RDBStorage(heartbeat_interval=...)`
    does that, or `study.tell(number, state=TrialState.FAIL)`). Each trial's score is its user attribute "smoothness".

    Args:
        probe: Gives the score of a setting, quickly and without looking at the objective. NaN skips the setting.
        search_space: The distributions, by name. Default those that all finished trials share; the first trial is then
            drawn at random.
        n_candidates: Settings drawn and probed a batch, >= 1; fewer where the space holds fewer. Default 30.
        n_finalists: Settings of a batch that become trials, in [1, n_candidates]. Default 5.
        keep: Whether the "largest" (default) or the "smallest" scores go on; `planish.tune.learners.KEEP` knows what
            the paper's scores want.
        then: Sampler that goes on when the first batch's finalists are used up; default another batch.
        seed: Seed >= 0 of the settings drawn; default one made from the study's name, the same for all its workers.

    Raises:
        ValueError: An argument is out of range; while sampling: every probe of a batch gave NaN.

    Example:
        >>> optuna.logging.set_verbosity(optuna.logging.WARNING)
        >>> space = {"x": optuna.distributions.FloatDistribution(-1, 1)}
        >>> sampler = SmoothieSampler(lambda p: -abs(p["x"]), space, n_candidates=50, n_finalists=2, seed=0)
        >>> study = optuna.create_study(sampler=sampler)
        >>> study.optimize(lambda trial: trial.suggest_float("x", -1, 1) ** 2, n_trials=2)
        >>> study.best_value < 0.01
        True
    """

    def __init__(
        self,
        probe: Callable[[dict[str, Any]], float],
        search_space: Mapping[str, optuna.distributions.BaseDistribution] | None = None,
        *,
        n_candidates: int = 30,
        n_finalists: int = 5,
        keep: Keep = "largest",
        then: optuna.samplers.BaseSampler | None = None,
        seed: int | None = None,
    ) -> None:
        where = "SmoothieSampler"
        if not callable(probe):
            raise bad(where, "probe", "a callable that takes the parameters and returns a float", probe)
        if search_space is not None and not search_space:
            raise bad(where, "search_space", "None or at least one distribution", search_space)
        if n_candidates < 1:
            raise bad(where, "n_candidates", "an int >= 1", n_candidates)
        if not 1 <= n_finalists <= n_candidates:
            raise bad(where, "n_finalists", f"an int in [1, n_candidates = {n_candidates}]", n_finalists)
        if keep not in KEEPS:
            raise bad(where, "keep", f"one of {', '.join(KEEPS)}", keep)
        if seed is not None and seed < 0:
            raise bad(where, "seed", "None or an int >= 0", seed)
        self._probe, self._then, self._seed = probe, then, seed
        self._space = None if search_space is None else dict(search_space)
        self._n_candidates, self._n_finalists, self._keep = n_candidates, n_finalists, keep
        self._others = optuna.samplers.RandomSampler(seed)
        self._drawn: dict[tuple[str, str, int], list[dict[str, Any]]] = {}

    def reseed_rng(self) -> None:
        """Reseed what is drawn outside batches; batches are the same in every worker on purpose."""
        self._others.reseed_rng()
        if self._then is not None:
            self._then.reseed_rng()

    def before_trial(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        """Let the sampler that goes on prepare itself."""
        if self._then is not None:
            self._then.before_trial(study, trial)

    def after_trial(
        self,
        study: optuna.Study,
        trial: optuna.trial.FrozenTrial,
        state: optuna.trial.TrialState,
        values: Sequence[float] | None,
    ) -> None:
        """Let the sampler that goes on learn from the trial."""
        if self._then is not None:
            self._then.after_trial(study, trial, state, values)

    def infer_relative_search_space(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> Space:
        """Return the given space, or what all finished trials share."""
        space = self._space
        if space is None:
            space = optuna.search_space.intersection_search_space(study.get_trials(deepcopy=False))
        return {name: space[name] for name in sorted(space) if not space[name].single()}

    def sample_relative(
        self, study: optuna.Study, trial: optuna.trial.FrozenTrial, search_space: Space
    ) -> dict[str, Any]:
        """Claim the best finalist that is free, probing a batch where that has not been done."""
        if not search_space:
            return {}
        key = _name(search_space)
        for batch in itertools.count() if self._then is None else (0,):
            if len(_claimed(study, trial, key, batch)) >= self._n_finalists:
                continue
            probed = self._probe_batch(study, trial, search_space, key, batch)
            scores = [score for _, score in probed]
            finalists = ranked(scores, self._keep)[: self._n_finalists]
            if not finalists:
                allowed = "a callable that gives a finite score to at least one candidate"
                raise bad("SmoothieSampler", "probe", allowed, f"none among {len(probed)}")
            chosen = _claim(study, trial, key, batch, finalists)
            if chosen is not None:
                params, score = probed[chosen]
                study._storage.set_trial_user_attr(trial._trial_id, "smoothness", score)
                return {name: space.to_external_repr(params[name]) for name, space in search_space.items()}
        return {} if self._then is None else self._go_on(self._then, study, trial, search_space)

    @staticmethod
    def _go_on(
        then: optuna.samplers.BaseSampler, study: optuna.Study, trial: optuna.trial.FrozenTrial, search_space: Space
    ) -> dict[str, Any]:
        wanted = then.infer_relative_search_space(study, trial)
        found = then.sample_relative(study, trial, wanted)
        return {name: value for name, value in found.items() if name in search_space}

    def sample_independent(
        self,
        study: optuna.Study,
        trial: optuna.trial.FrozenTrial,
        param_name: str,
        param_distribution: optuna.distributions.BaseDistribution,
    ) -> Any:  # noqa: ANN401  (a choice may be anything)
        """Draw what no batch holds: at random, or by the sampler that goes on once the finalists are used up."""
        goes_on = self._then is not None and trial.system_attrs.get(_CLAIM) is None
        sampler = self._then if goes_on and self._then is not None else self._others
        return sampler.sample_independent(study, trial, param_name, param_distribution)

    def _probe_batch(
        self, study: optuna.Study, trial: optuna.trial.FrozenTrial, space: Space, key: str, batch: int
    ) -> list[tuple[dict[str, float], float]]:
        """Return settings, as the storage spells them, and scores; probe those that no worker has probed."""
        storage, study_id = study._storage, study._study_id
        drawn = self._draw(study, trial, space, key, batch)
        start = trial.number * len(drawn) // self._n_finalists  # workers that start together begin at different places
        names = [f"smoothie:{key}:{batch}:{i}" for i in range(len(drawn))]
        order = [(start + step) % len(drawn) for step in range(len(drawn))]
        while True:
            known = storage.get_study_system_attrs(study_id)
            left = [i for i in order if names[i] not in known]
            if not left:
                break
            # First what nobody has begun; what was begun and not finished may belong to a worker that was killed.
            i = next((i for i in left if f"{names[i]}:begun" not in known), left[0])
            storage.set_study_system_attr(study_id, f"{names[i]}:begun", trial.number)
            score = float(self._probe(dict(drawn[i])))
            if not math.isfinite(score):
                warn_once(f"SmoothieSampler: the probe of {drawn[i]} gave {score}; the candidate is skipped.")
            internal = {name: space[name].to_internal_repr(value) for name, value in drawn[i].items()}
            kept = score if math.isfinite(score) else None
            storage.set_study_system_attr(study_id, names[i], {"params": internal, "score": kept})
        rows = [known[name] for name in names]
        return [(row["params"], math.nan if row["score"] is None else row["score"]) for row in rows]

    def _draw(
        self, study: optuna.Study, trial: optuna.trial.FrozenTrial, space: Space, key: str, batch: int
    ) -> list[dict[str, Any]]:
        """Return distinct random settings, a function of seed, space and batch alone."""
        source = study.study_name if self._seed is None else str(self._seed)
        place = (source, key, batch)
        if place not in self._drawn:
            words = np.frombuffer(sha256(f"{source}:{key}:{batch}".encode()).digest(), dtype="<u4")
            random = optuna.samplers.RandomSampler(int(words[0]))
            settings: dict[str, dict[str, Any]] = {}
            for _ in range(10 * self._n_candidates):  # a small space may hold fewer
                params = {n: random.sample_independent(study, trial, n, d) for n, d in space.items()}
                settings.setdefault(json.dumps([d.to_internal_repr(params[n]) for n, d in space.items()]), params)
                if len(settings) == self._n_candidates:
                    break
            self._drawn[place] = list(settings.values())
        return self._drawn[place]


def _name(space: Space) -> str:
    """Name a space: settings of one are not settings of another."""
    text = json.dumps({name: optuna.distributions.distribution_to_json(space[name]) for name in sorted(space)})
    return sha256(text.encode()).hexdigest()[:12]


def _others(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> Iterator[optuna.trial.FrozenTrial]:
    for other in study._storage.get_all_trials(study._study_id, deepcopy=False):
        if other._trial_id != trial._trial_id:
            yield other


def _claimed(study: optuna.Study, trial: optuna.trial.FrozenTrial, key: str, batch: int) -> set[int]:
    """Return the candidates that are not free: another trial has them, or failed on them twice."""
    taken, failed = set(), set()
    for other in _others(study, trial):
        claim = other.system_attrs.get(_CLAIM)
        if claim is None or claim[:2] != [key, batch]:
            continue
        if other.state != optuna.trial.TrialState.FAIL or claim[2] in failed:
            taken.add(claim[2])
        failed.add(claim[2])
    return taken


def _claim(
    study: optuna.Study, trial: optuna.trial.FrozenTrial, key: str, batch: int, finalists: list[int]
) -> int | None:
    """Mark a finalist as this trial's, or return None where none is free.

    Optuna's storages have no transaction for that. So: write the claim, look again, and withdraw if another trial has
    the same. Of two trials with one claim, the one that wrote later has looked after both had written, so both cannot
    stay. Trials that met each other part by the number of unclaimed trials before them.
    """
    storage = study._storage
    for attempt in range(_ATTEMPTS):
        taken = _claimed(study, trial, key, batch)
        free = [i for i in finalists if i not in taken]
        if not free:
            return None
        ahead = sum(
            other.number < trial.number
            and other.state == optuna.trial.TrialState.RUNNING
            and other.system_attrs.get(_CLAIM) is None
            for other in _others(study, trial)
        )
        chosen = free[ahead % len(free) if attempt else 0]
        storage.set_trial_system_attr(trial._trial_id, _CLAIM, [key, batch, chosen])
        if chosen not in _claimed(study, trial, key, batch):
            return chosen
        storage.set_trial_system_attr(trial._trial_id, _CLAIM, None)
        time.sleep(0.002 * attempt * (1 + trial.number % 7))
    return None
