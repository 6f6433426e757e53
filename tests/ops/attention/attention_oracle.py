"""Softmax attention in float64, a query of a head at a time: values and all gradients."""

import numpy as np


def find(arrays, mask, scale, sink=None):
  """Returns out (B, L, N, P) and lse (B, L, N) of arrays q, k, v."""
  q, k, v = arrays
  out, lse = np.zeros((*q.shape[:3], v.shape[-1])), np.full(q.shape[:3], -np.inf)
  for b, query, n in np.ndindex(*q.shape[:3]):
    prob, lse[b, query, n] = _softmax(arrays, mask, scale, sink, (b, query, n))
    out[b, query, n] = prob @ v[b, :, n // (q.shape[2] // k.shape[2])]
  return out, lse


def pull_back(arrays, mask, scale, cotangents, sink=None):
  """Returns the gradients of q, k, v and the sinks (zeros without) of sum(out dout + lse dlse)."""
  q, k, v = arrays
  dq, dk, dv = (np.zeros(x.shape) for x in arrays)
  dsink = np.zeros(q.shape[2])
  for b, query, n in np.ndindex(*q.shape[:3]):
    head = n // (q.shape[2] // k.shape[2])
    dout, dlse = (x[b, query, n] for x in cotangents)
    prob, lse = _softmax(arrays, mask, scale, sink, (b, query, n))
    if np.isneginf(lse):
      continue
    dprob = v[b, :, head] @ dout
    dscore = prob * (dprob - prob @ dprob + dlse)
    dq[b, query, n] += scale * dscore @ k[b, :, head]
    dk[b, :, head] += scale * np.outer(dscore, q[b, query, n])
    dv[b, :, head] += np.outer(prob, dout)
    if sink is not None:
      dsink[n] += np.exp(sink[n] - lse) * (dlse - prob @ dprob)
  return dq, dk, dv, dsink


def _softmax(arrays, mask, scale, sink, place):
  """Returns the shares of all keys for one query, and the log of the sum they are shares of."""
  (b, query, n), (q, k, _) = place, arrays
  seen = np.flatnonzero(mask[b, query])
  score = scale * k[b, seen, n // (q.shape[2] // k.shape[2])] @ q[b, query, n]
  every = score if sink is None else np.append(score, sink[n])
  prob = np.zeros(k.shape[1])
  if not every.size:
    return prob, -np.inf
  lse = every.max() + np.log(np.exp(every - every.max()).sum())
  prob[seen] = np.exp(score - lse)
  return prob, lse
