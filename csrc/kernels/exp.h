// exp and tanh of every lane by polynomials, the same in full vectors and tails.
#pragma once

#include "simd.h"

namespace mainspring::MAINSPRING_ISA {

// Within 2 ulp; exp(0) is exactly 1, exp(-inf) exactly 0, overflow inf, NaN stays NaN.
// x = n ln 2 + r with |r| <= ln(2) / 2; the polynomial is that of Cephes' expf.
MS_INLINE vf exp(vf x) {
  // The bound stands first: vmax and vmin give their second operand where x is NaN.
  x = vmin(all(89.0f), vmax(all(-105.0f), x));
  // Adding 1.5 * 2^23 rounds to an integer.
  const vf magic = all(12582912.0f);
  const vf n = sub(add(mul(x, all(1.44269504088896341f)), magic), magic);
  vf r = fma(n, all(-0.693359375f), x);
  r = fma(n, all(2.12194440e-4f), r);
  vf p = all(1.9875691500e-4f);
  p = fma(p, r, all(1.3981999507e-3f));
  p = fma(p, r, all(8.3334519073e-3f));
  p = fma(p, r, all(4.1665795894e-2f));
  p = fma(p, r, all(1.6666665459e-1f));
  p = fma(p, r, all(5.0000001201e-1f));
  p = add(fma(p, mul(r, r), r), all(1.0f));
  return scale_by_power(p, n);
}

// Within a few ulp. Small arguments have a polynomial of their own (Cephes' tanhf): the other form cancels there.
MS_INLINE vf tanh(vf x) {
  const vf z = mul(x, x);
  vf p = all(-5.70498872745e-3f);
  p = fma(p, z, all(2.06390887954e-2f));
  p = fma(p, z, all(-5.37397155531e-2f));
  p = fma(p, z, all(1.33314422036e-1f));
  p = fma(p, z, all(-3.33332819422e-1f));
  const vf small = fma(mul(p, z), x, x);
  const vf large = sub(all(1.0f), div(all(2.0f), add(exp(mul(all(2.0f), x)), all(1.0f))));
  return select_less(z, all(0.625f * 0.625f), small, large);
}

MS_INLINE float exp_one(float x) {
  float lanes[kLanes];
  store(lanes, exp(all(x)));
  return lanes[0];
}

}  // namespace mainspring::MAINSPRING_ISA
