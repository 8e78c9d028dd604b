"""The limits of the verdict, each with its reason and the data on which it was set.

Data sets, by the names used below:

- *in-view*, *kept-apart*, *second-apart*: problems of ``scaling.samplers.verdicts``. Most limits were set while looking
  at in-view alone, a few with all three known.
- *teachers*: deep linear networks, of type A (rank-deficient layers) at nbeta = n / log n in
  ``scaling.samplers.teachers``, and of types A and B (full rank) in the Kronecker metric at nbeta = 1e8 in
  ``scaling.samplers.metric``.
- *networks*: small networks with label noise of ``scaling.samplers.networks``, seeds 0 to 9. Its tables show others.
- "Not recorded": the limit came with its rule, and no study is known on which it was chosen.

A SHARE is of the absolute value of the estimate, a SIGMA a number of standard errors. Most rules have both, and fail
only beyond both: a difference has to be large enough to matter, and sure enough to be real.
"""

# --- chains disagree

# R-hat. Vehtari et al. (arXiv:1903.08008) advise 1.01, and 1.1 was usual before. Not recorded.
RHAT_LIMIT = 1.05
# Between the means of chains started at w* and of chains started hot. Not recorded.
BRACKET_SHARE = 0.05
BRACKET_SIGMA = 4.0

# --- too few draws

# Draws of a chain: with fewer there is neither R-hat nor an effective sample size.
LEAST_DRAWS = 4
# Standard error of the estimate. With more, over a third of unbiased estimates are off by more than 10 %. It was 0.1,
# then 0.125; 0.11 was set with in-view, kept-apart and second-apart all known.
ERROR_SHARE = 0.11
# With fewer effective draws the standard error is itself uncertain by an eighth or more: then it has to be as small as
# the share below. Not recorded.
FEW_DRAWS = 30
ERROR_SHARE_OF_FEW = 0.02
# Standard error that the remedy aims at. It decides on words alone.
GOOD_ERROR = 0.05
# How many times as many draws: no factor below the first, and none above the second, where the estimate is rough.
# They decide on words alone.
LEAST_TIMES = 1.1
MOST_TIMES = 100

# --- still rising, still falling

# Mean of the second half of the draws less that of the first. Under 5 % of stationary series exceed three standard
# errors (tests/diagnostics/test_verdict.py); the share leaves out what is too small to matter. Not recorded.
TREND_SIGMA = 3.0
TREND_SHARE = 0.02
# What one more doubling of the run would add. Set on networks; its standard errors are counted by ``TREND_SIGMA``.
RISE_SHARE = 0.03
# The bias of directions that have not relaxed yet, by all curvatures at w*: as much as for the rise, since it answers
# the same question. Set on the linear regressions of networks.
UNRELAXED_SHARE = 0.03
# The curvatures at w* say nothing of the posterior where they give more than the draws by this share of it, and by the
# number of standard errors: then no bias is derived from them. Set on networks of 12 rectified linear units with label
# noise, where the curvatures gave 7.5 to 13 and the draws 5.9 to 7.6.
CURVATURE_SHARE = 0.1
CURVATURE_SIGMA = 4.0
# Virial ratio, about the share of the directions that have equilibrated. It is low because flat directions equilibrate
# long after the estimate has. It was 0.3 and was lowered with teachers in the Kronecker metric known.
VIRIAL_LIMIT = 0.2

# --- not resolved in float32

# Spacing of float32 at the loss of w*, times nbeta, over the LLC. Set on the regressions without label noise of
# tests/estimators/test_resolution.py, with a constant added to the loss: at 0.13, by the true LLC, the estimate loses a
# tenth, at 0.26 two fifths, at 0.008 nothing.
ROUNDING_SHARE = 0.1
# Rounding averages out where examples differ enough: their losses less those at w* spread by the first number of LLCs
# and the second number of spacings. Without label noise the spread is 1 to 2 true LLCs, and fewer than so many spacings
# wherever rounding has taken much of the estimate; with unit noise in the same regressions it is 16 LLCs, 60 spacings.
# Where it is not known (a loss that comes as a mean), this share of draws is below the loss of w*: rounding keeps the
# order, and without noise there are none.
DITHER_SHARE = 5.0
DITHER_SPACINGS = 10.0
DITHER_NEGATIVE = 0.02

# --- not a minimum

# The mean of the draws may be below the loss of w* by the first number of standard errors, and the lowest of so many
# parts of the run by the second, of a part: the lowest of eight is below their mean by chance. Not recorded.
LOWER_SIGMA = 2.0
LOWER_PARTS = 8
LOWER_PART_SIGMA = 5.0
# What the slope of the loss at w* takes from the estimate. Set with in-view, kept-apart and second-apart all known.
TILT_SHARE = 0.03
TILT_SIGMA = 4.0

# --- biased by the step size, heated by minibatch noise

# A bias that is known to first order: at this share its second order is some 2 % of the estimate. Not recorded.
BIAS_SHARE = 0.15
# Biases up to this share of the raw estimate are subtracted, larger ones are reported only. Not recorded.
CORRECTION_SHARE = 0.25
# Distance of the kinetic temperature from what minibatch noise explains. It came with the study of in-view.
KINETIC_LIMIT = 0.15
# The same where the chains move in a metric: there all directions are about as stiff as the stiffest, so that heat in
# any of them moves the estimate. Set on teachers in the Kronecker metric.
KINETIC_LIMIT_METRIC = 0.05
# In a metric, unexplained heat is also compared with ``BIAS_SHARE`` of the estimate, and has to be this sure. Set after
# one of the teachers of type B in the Kronecker metric was found 17 % too high.
HEAT_SIGMA = 4.0
# Variance of nbeta L over its mean, about 1 in a posterior. A few draws that a step has thrown far off make it many
# times as large. It came in the change that added kept-apart; whether its results were known is not recorded.
SPIKE_LIMIT = 4.0
# Share of the variance of the loss that may be minibatch noise: with more, the covariance of the loss with the squared
# gradient is that of the batches, and does not correct the bias of the step size. Set with in-view and kept-apart
# known.
NOISE_SHARE = 0.1

# --- depends on nbeta or localization

# What a factor e in nbeta adds to the estimate. The share was set on in-view, the standard errors on in-view and on
# teachers of type A, seeds 0 to 19, of which six are off their learning coefficient by more than 10 %.
SLOPE_SHARE = 0.05
SLOPE_SIGMA = 2.5
# By how much a localization that the range of the curvatures demands lowers the estimate. Set on a least-squares
# problem with unscaled inputs, of whose directions it hid half.
HIDDEN_SHARE = 0.2
# Degree of the loss, the power of the distance to w* with which it grows. The steepest of the problems in
# ``scaling.known_answers`` have 6. Set on teachers of type A, seeds 0 to 19. It has to be above by
# ``SLOPE_SIGMA`` standard errors.
DEGREE_LIMIT = 6.25
# The same where the localization confines more than ``LOCALIZED_SHARE`` of the directions. A product of two layers has
# degree 4. A product of L layers has 2 L by right, but then the loss itself confines more than half of the directions:
# L + 1 of 2 L, if the widths are equal. Set on teachers of type A, seeds 0 to 19.
LOCALIZED_DEGREE_LIMIT = 4.0
LOCALIZED_SHARE = 0.5
# Degree of a regular minimum: where the slopes are weighed by the degree, it is taken to be no lower.
REGULAR_DEGREE = 2.0
