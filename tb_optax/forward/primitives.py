"""Names of primitives that are treated alike."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


CALLS = _words(
    """
    call checkpoint closed_call core_call custom_jvp_call custom_vjp_call jit pjit remat
    remat2
    """
)

REDUCTIONS = _words(
    """
    argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum
    reduce_xor
    """
)

ELEMENTWISE = _words(
    """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e
    cbrt ceil clamp clz complex conj cos cosh digamma div eq eq_to erf erf_inv erfc exp
    exp2 expm1 floor ge gt igamma igammac imag integer_pow is_finite le le_to lgamma
    log log1p logistic lt lt_to max min mul ne neg nextafter not or polygamma
    population_count pow real rem round rsqrt select_n shift_left
    shift_right_arithmetic shift_right_logical sign sin sinh sqrt square sub tan tanh
    xor zeta
    """
)

# They make of a parameter something that is not its entries moved.
COMPUTED = _words(
    """
    approx_top_k cumlogsumexp cummax cummin cumprod cumsum reduce_window
    reduce_window_max reduce_window_min reduce_window_sum sort top_k
    """
)
