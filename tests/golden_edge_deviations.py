"""Every disagreement with the published code on degenerate nets, with its reason.

For "alpha", a case is a net, with "/layer" where it has several, a configuration is a
row of METRIC_CONFIGS, and ours is "fitted" or "not fitted".  For "rate", a case is a
net, a configuration is a row of RATE_CONFIGS, and ours is "untouched" (every
multiplier is 1) or "others" (the remaining layers are balanced among themselves).
"""

import golden
from golden_deviations import Deviation, where

EDGE = golden.read_json("edge_cases")
METRIC_CONFIGS, RATE_CONFIGS = EDGE["metric_configs"], EDGE["lr_configs"]

# Fits.
FITS = frozenset(range(len(METRIC_CONFIGS)))
MEDIAN = where(METRIC_CONFIGS, pl_fitting="median")
MEDIAN_2 = where(METRIC_CONFIGS, pl_fitting="median", xmin_pos=2)
MIN_KS = where(METRIC_CONFIGS, pl_fitting="goodness-of-fit")
PEAK = where(METRIC_CONFIGS, pl_fitting="fix-finger")
FLOOR = where(METRIC_CONFIGS, filter_zeros=True)

# Rates; 30 names a map that does not exist, which a function cannot.
LINEAR = where(RATE_CONFIGS, assign_func="tb_linear_map")
SQRT = where(RATE_CONFIGS, assign_func="tb_sqrt")
LOG2 = where(RATE_CONFIGS, assign_func="tb_log2")
STEP = where(RATE_CONFIGS, assign_func="tb_step")
RATES = LINEAR | SQRT | LOG2 | STEP
FIRST = where(RATE_CONFIGS, remove_first_layer=True, remove_last_layer=False)
BOTH = where(RATE_CONFIGS, remove_first_layer=True, remove_last_layer=True)
EVERY = RATES - FIRST - BOTH
FROM_5 = where(RATE_CONFIGS, eigs_thresh=5)
ALPHA_HAT = where(RATE_CONFIGS, esd_metric_for_tb="alphahat")
BY_MIN_KS = where(RATE_CONFIGS, pl_fitting="goodness-of-fit")
NORM_BY_ORDER = where(RATE_CONFIGS, batchnorm_type="order")
LAYER_NORM = where(RATE_CONFIGS, layernorm=True)

# Nets of one layer, by what it is.
TINY = ("two_rows", "three_rows", "four_cols")
ONE_EIGENVALUE = ("one_row", "scalar", "scalar_one")
EQUAL = ("identity", "scaled_identity")
LOW_RANK = ("rank_one", "low_rank", "zero_rows", "zero_cols")
# Their λ_max is below 1, so that alpha_hat is negative.
SMALL = (
    "conv_zero_taps",
    "conv_dead_filters",
    "tiny_scale",
    "tiny_scale_some",
    "one_above",
    "two_above",
    "three_above",
)
ORDINARY = (
    "diag_distinct",
    "diag_repeated",
    "huge_scale",
    "single_layer",
    "single_conv",
    "bare_linear",
)
NOT_FINITE = ("huge_overflow", "inf_weight")
ALONE = (*TINY, *ONE_EIGENVALUE, *EQUAL, *LOW_RANK, *SMALL, *ORDINARY, *NOT_FINITE)
FEW = (*TINY, *ONE_EIGENVALUE)


NO_SPECTRUM = "no finite spectrum: its layer is left alone, nobody else's is"
ALL_EQUAL = "all eigenvalues of the tail are equal up to rounding: there is no tail"
SINGLE = "a tail of one eigenvalue has no exponent"
NOISE = "xmin is rounding noise of the decomposition, by the route of the fit"
ZERO = "xmin is exactly zero"
ZEROS = "zeros have no place in the histogram of log10 λ; the others have"
TEMPORARIES = "the published histogram overflows in float32"
NEIGHBOUR = "a layer without a fit does not stop the others"
UNTUNED_ONE = "one tuned layer has nothing to be balanced against: 1, not a bound"
UNTUNED_TIE = "equal scores give 1, not a bound or ranks in an order of chance"
NOTHING_LEFT = "no layer is left: nothing is tuned"
NO_SCORE = "a layer without a finite score is left alone, and no one else's affair"
DOMAIN = "a score outside the map's domain: its layer is left alone"
SHARED = "a shared kernel is one layer, listed once"
NORM_FIRST = "a norm with no layer before it follows none"

DEVIATIONS = (
    # Fits.
    Deviation("alpha", ("all_zero_weight",), FITS, "raises", "not fitted", NO_SPECTRUM),
    Deviation("alpha", ("nan_weight",), FITS, "raises", "not fitted", NO_SPECTRUM),
    Deviation("alpha", ("inf_weight",), FITS - PEAK, "nan", "not fitted", NO_SPECTRUM),
    Deviation("alpha", ("inf_weight",), PEAK, "raises", "not fitted", NO_SPECTRUM),
    Deviation("alpha", ("identity",), FITS, "inf", "not fitted", ALL_EQUAL),
    Deviation("alpha", ("nan_alphahat/0",), FITS, "inf", "not fitted", ALL_EQUAL),
    Deviation(
        "alpha",
        ("scaled_identity",),
        FITS - where(METRIC_CONFIGS, pl_fitting="median", xmin_pos=3),
        "inf",
        "not fitted",
        ALL_EQUAL,
    ),
    Deviation(
        "alpha",
        ("scaled_identity",),
        where(METRIC_CONFIGS, pl_fitting="median", xmin_pos=3),
        "finite",
        "not fitted",
        ALL_EQUAL,
    ),
    Deviation(
        "alpha",
        (*ONE_EIGENVALUE, "inf_score/1"),
        MEDIAN,
        "inf",
        "not fitted",
        SINGLE,
    ),
    Deviation(
        "alpha",
        (*ONE_EIGENVALUE, "inf_score/1"),
        FITS - MEDIAN,
        "raises",
        "not fitted",
        SINGLE,
    ),
    Deviation("alpha", ("two_rows",), MEDIAN_2, "inf", "not fitted", SINGLE),
    Deviation("alpha", ("two_above",), MEDIAN_2 & FLOOR, "inf", "not fitted", SINGLE),
    Deviation(
        "alpha",
        ("rank_one", "one_above"),
        MEDIAN & FLOOR,
        "inf",
        "not fitted",
        SINGLE,
    ),
    Deviation(
        "alpha",
        ("rank_one", "one_above"),
        FLOOR - MEDIAN,
        "raises",
        "not fitted",
        SINGLE,
    ),
    Deviation(
        "alpha",
        ("inf_score/0", "inf_score/2"),
        FITS - MEDIAN,
        "raises",
        "fitted",
        NEIGHBOUR,
    ),
    Deviation(
        "alpha",
        ("rank_one", "low_rank"),
        MEDIAN - FLOOR,
        "finite",
        "not fitted",
        NOISE,
    ),
    Deviation(
        "alpha",
        ("one_above", "two_above", "three_above"),
        MEDIAN - FLOOR,
        "finite",
        "not fitted",
        NOISE,
        ("float32",),
    ),
    Deviation(
        "alpha",
        ("rank_one",),
        FITS - MEDIAN - FLOOR,
        "finite",
        "not fitted",
        NOISE,
        ("float32",),
    ),
    Deviation(
        "alpha",
        ("low_rank",),
        PEAK - FLOOR,
        "finite",
        "not fitted",
        NOISE,
        ("float32",),
    ),
    Deviation(
        "alpha",
        ("zero_rows", "zero_cols"),
        MEDIAN - MEDIAN_2 - FLOOR,
        "nan",
        "not fitted",
        ZERO,
    ),
    Deviation(
        "alpha",
        ("zero_rows", "zero_cols", "conv_zero_taps"),
        PEAK - FLOOR,
        "raises",
        "fitted",
        ZEROS,
    ),
    Deviation("alpha", ("huge_overflow",), PEAK, "finite", "fitted", TEMPORARIES),
    # Rates of nets with one layer.
    Deviation(
        "rate",
        ("all_zero_weight", "nan_weight"),
        RATES,
        "raises",
        "untouched",
        NO_SPECTRUM,
    ),
    Deviation("rate", ALONE, BOTH, "raises", "untouched", NOTHING_LEFT),
    Deviation("rate", ALONE, LINEAR & FIRST, "raises", "untouched", NOTHING_LEFT),
    Deviation(
        "rate", FEW, LINEAR & EVERY & FROM_5, "raises", "untouched", NOTHING_LEFT
    ),
    Deviation(
        "rate",
        (*LOW_RANK, *SMALL, *ORDINARY),
        LINEAR & EVERY,
        "finite",
        "untouched",
        UNTUNED_ONE,
    ),
    Deviation(
        "rate",
        (*EQUAL, *LOW_RANK, *SMALL, *ORDINARY, *NOT_FINITE),
        STEP & EVERY,
        "finite",
        "untouched",
        UNTUNED_ONE,
    ),
    Deviation("rate", FEW, (STEP & EVERY) - FROM_5, "finite", "untouched", UNTUNED_ONE),
    Deviation(
        "rate", TINY, (LINEAR & EVERY) - FROM_5, "finite", "untouched", UNTUNED_ONE
    ),
    Deviation(
        "rate",
        ("one_row", "scalar"),
        (LINEAR & EVERY) - FROM_5 - BY_MIN_KS,
        "finite",
        "untouched",
        NO_SCORE,
    ),
    Deviation(
        "rate",
        ("scalar_one",),
        (LINEAR & EVERY) - FROM_5 - BY_MIN_KS - ALPHA_HAT,
        "finite",
        "untouched",
        NO_SCORE,
    ),
    Deviation("rate", ONE_EIGENVALUE, BY_MIN_KS, "raises", "untouched", NO_SCORE),
    Deviation(
        "rate",
        ("scaled_identity",),
        LINEAR & EVERY,
        "finite",
        "untouched",
        NO_SCORE,
    ),
    Deviation(
        "rate",
        ("identity",),
        (LINEAR & EVERY) - ALPHA_HAT,
        "finite",
        "untouched",
        NO_SCORE,
    ),
    Deviation(
        "rate",
        ("identity", "scalar_one"),
        LINEAR & ALPHA_HAT,
        "nan",
        "untouched",
        NO_SCORE,
    ),
    Deviation("rate", EQUAL, (SQRT | LOG2) & EVERY, "nan", "untouched", NO_SCORE),
    Deviation(
        "rate",
        (*ONE_EIGENVALUE, "two_rows"),
        ((SQRT | LOG2) & EVERY) - FROM_5,
        "nan",
        "untouched",
        NO_SCORE,
    ),
    Deviation(
        "rate",
        NOT_FINITE,
        (LINEAR | SQRT | LOG2) & EVERY,
        "nan",
        "untouched",
        NO_SCORE,
    ),
    Deviation("rate", SMALL, SQRT & ALPHA_HAT, "nan", "untouched", DOMAIN),
    # Rates of nets with several.
    Deviation(
        "rate",
        ("two_layers",),
        (LINEAR | STEP) & FIRST,
        "finite",
        "untouched",
        UNTUNED_ONE,
    ),
    Deviation(
        "rate", ("two_layers",), LINEAR & BOTH, "raises", "untouched", NOTHING_LEFT
    ),
    Deviation(
        "rate", ("tied_alphas",), LINEAR | STEP, "finite", "untouched", UNTUNED_TIE
    ),
    Deviation(
        "rate",
        ("bn_first", "ln_first", "bn_no_affine"),
        (LINEAR | STEP) & BOTH,
        "finite",
        "untouched",
        UNTUNED_ONE,
    ),
    Deviation("rate", ("bn_first",), NORM_BY_ORDER, "raises", "others", NORM_FIRST),
    Deviation("rate", ("ln_first",), LAYER_NORM, "raises", "others", NORM_FIRST),
    # Layer 1 of inf_score and layer 0 of nan_alphahat have no score.
    Deviation(
        "rate",
        ("inf_score",),
        ((LINEAR | STEP) & EVERY) - FROM_5 - BY_MIN_KS,
        "finite",
        "others",
        NO_SCORE,
    ),
    Deviation("rate", ("inf_score",), BY_MIN_KS, "raises", "others", NEIGHBOUR),
    Deviation(
        "rate",
        ("inf_score",),
        ((SQRT | LOG2) & EVERY) - FROM_5,
        "nan",
        "others",
        NO_SCORE,
    ),
    Deviation(
        "rate",
        ("inf_score",),
        ((SQRT | LOG2) - EVERY) - FROM_5,
        "nan",
        "untouched",
        NO_SCORE,
    ),
    Deviation(
        "rate",
        ("inf_score",),
        ((LINEAR | STEP) & BOTH) - FROM_5,
        "finite",
        "untouched",
        NO_SCORE,
    ),
    Deviation(
        "rate",
        ("inf_score",),
        (LINEAR | STEP) & FIRST,
        "finite",
        "untouched",
        UNTUNED_ONE,
    ),
    Deviation(
        "rate",
        ("inf_score",),
        LINEAR & BOTH & FROM_5,
        "raises",
        "untouched",
        NOTHING_LEFT,
    ),
    Deviation(
        "rate",
        ("nan_alphahat",),
        ((LINEAR | STEP) & EVERY) - ALPHA_HAT,
        "finite",
        "others",
        NO_SCORE,
    ),
    Deviation(
        "rate",
        ("nan_alphahat",),
        ((SQRT | LOG2) & EVERY) | ALPHA_HAT,
        "nan",
        "others",
        NO_SCORE,
    ),
    Deviation(
        "rate",
        ("nan_alphahat",),
        (LINEAR | STEP) & BOTH,
        "finite",
        "untouched",
        UNTUNED_ONE,
    ),
    # Published: layers 0, 1 and 2, the third with the kernel of the first.
    Deviation(
        "rate",
        ("shared_weight",),
        (SQRT | LOG2 | STEP) & EVERY,
        "finite",
        "others",
        SHARED,
    ),
    Deviation("rate", ("shared_weight",), FIRST, "finite", "untouched", SHARED),
    Deviation(
        "rate",
        ("shared_weight",),
        (LINEAR | STEP) & BOTH,
        "finite",
        "untouched",
        SHARED,
    ),
)
