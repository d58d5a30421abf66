"""What counts as support, written before the runs it is about, and what it says to their results."""

from __future__ import annotations

from benchmarks.reproduce_small.measures import MAIN
from benchmarks.reproduce_small.plan import EQUAL_TIME, LENGTH

SUPPORT = """The claim under test: beside the next-token loss, next-sequence prediction makes a fast-weight
model use a long context better than the same training without it. The main comparison is REFINE (c = 8, cosine
reward, positions by entropy) minus SFT at equal updates, five seeds, on text of which half is generated
documents of needles; the main measure is the share of needles found at 2,048 tokens, twice the training length,
over niah_single_2 and niah_multikey_1, which weigh alike; each of the four needles of a niah_multikey_1 prompt
is asked for, and their mean is one item.

- **Supported**: the 95 % interval of that difference lies above 0, and the difference from SFT for REFINE's
  time is above 0 as well. If the first holds and the second does not, it is supported at equal updates only.
- **Contradicted**: the interval lies below 0.
- **No difference seen**: the interval holds 0. If it lies within 3 points to either side, an effect of more
  than 3 points is excluded for this model, data and number of updates; else the question stays open.

The other rows are there to be read beside it and decide nothing: of so many, one in twenty leaves 0 out by
chance. A gain in needles that comes with a held-out loss worse by over 0.02 nats is reported as a trade, not as
support.

The learning rate of either side is the one of {rates} with the fewest nats a token of the right
answers: 32 needles a task at 2,048 tokens, other than those measured, one run of seed {seed} and as many updates
as the arms."""
AGAIN = """\
Written and committed before the second run began, and after the first one's results had been seen. It has
seeds 5 to 9, other needles, other held-out documents, other random tokens, and learning rates chosen anew (seed
105); 24 prompts a task at 4,096 tokens instead of 12, at 1,024 and 2,048 as many as the first. The arms that the
first run did not reach come right after the main pair and SFT for REFINE's time.

- The main comparison is judged by the rules above, from the second run's figures alone, and stands beside the
  first. The two agree if their intervals overlap.
- Of the rows of REFINE minus SFT, and of those of every other arm that both runs have, it is counted in how many
  the intervals overlap. Two independent runs of one effect with right intervals of equal width overlap in 99.4 %
  of the rows, which asks little; therefore it is also counted in how many the second run's difference lies in
  the first run's interval: expected are 83 %. Few seeds make intervals too narrow, so somewhat fewer of both; and
  rows of the same models and prompts are not independent. Rows where an interval has no width are left out.
- Of the rows in which the first run's interval left 0 out it is counted in how many the second run's does so on
  the same side: those were found twice.
- Pooled differences (means of the two runs weighted by their seeds, with standard errors from both intervals) are
  estimates and no verdict, as the second run was planned when the first was known."""


ANSWERS = """\
Written and committed before any arm of it was run, and after the first two runs' results had been seen. In both,
SFT finds fewer needles after its updates than before them, so they tell which side loses less. Here both sides'
next-token loss stands on the answers, as when the models learned to find needles (answers weigh
{answer_weight:g}, the rest of their documents {context_weight:g}), so that SFT itself should find more; the policy
loss has no weights.

From the packaged model that is not so: of the rates {rates}, none gave the answers more probability
than before (32 other needles a task at 2,048 tokens, seed 110: 0.669 and 0.794 nats a token before, with the lowest
rate 0.674 and 0.802 by SFT, 0.674 and 0.799 by REFINE; with higher ones more). It seems to have learned of such
documents what 50 updates can teach, and no arm was run from it. The comparison begins with a model that should
still be learning, the hybrid of `make pretrain-tiny-hybrid` (1,200 updates; a run before its last change found a
third of the needles among several keys at 1,024 tokens), and takes 100 updates.

Seeds 10 to 12 (three instead of five: these runs are longer), other needles, other held-out documents; the rates
chosen as before from {rates}. The main comparison is judged by the rules above, from this
run's figures alone. It asks something else than the first two and is not pooled with them. The other arms, where
time is left, are SFT for REFINE's time and SFT at 0.8 times its rate, three seeds each."""


def verdict(table: dict) -> str:
    """What ``SUPPORT`` says to the main comparison, in words."""
    main = table["measures"]["REFINE"][MAIN]
    low, high = (100 * end for end in main["interval"])
    seeds = ", ".join(f"{100 * one:+.1f}" for one in main["differences"])
    lines = [
        f"REFINE minus SFT at equal updates: **{100 * main['difference']:+.2f} points** of needles found at "
        f"{2 * LENGTH:,} tokens, 95 % interval {low:+.2f} to {high:+.2f} ({high - low:.1f} points wide); "
        f"by seed {seeds}."
    ]
    more = None
    if at_time := table["refine_minus"].get(EQUAL_TIME, {}).get(MAIN):
        more = 100 * at_time["difference"]
        ends = " to ".join(f"{100 * end:+.2f}" for end in at_time["interval"])
        seeds = len(at_time["differences"])
        lines.append(f"REFINE minus SFT for REFINE's time: {more:+.2f} points ({ends}; {seeds} seeds).")
    if low > 0 and table["measures"]["REFINE"]["loss"]["difference"] > 0.02:
        lines.append("**A trade**: more needles, at a held-out loss worse by over 0.02 nats.")
    elif low > 0:
        known = "**Supported**" if more is not None and more > 0 else "**Supported at equal updates only**"
        lines.append(f"{known}, for this model, data and number of updates.")
    elif high < 0:
        lines.append("**Contradicted**, for this model, data and number of updates.")
    elif low > -3 and high < 3:
        lines.append(
            "**No difference seen**; an effect of more than 3 points is excluded for this model, data and "
            "number of updates."
        )
    else:
        lines.append("**No difference seen**, and the question stays open.")
    return " ".join(lines)
