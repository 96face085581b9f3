// exp of every lane by one polynomial, the same in full vectors and tails.
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

MS_INLINE float exp_one(float x) {
  float lanes[kLanes];
  store(lanes, exp(all(x)));
  return lanes[0];
}

}  // namespace mainspring::MAINSPRING_ISA
