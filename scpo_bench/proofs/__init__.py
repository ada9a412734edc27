"""Proofs that a policy is safe from every start state, where the plant is known.

A proof is a cover of a set by boxes, on each of which an enclosure of the policy settles the
question; a box that is not settled is split. Enclosures hold for the policy in exact arithmetic;
the float32 arithmetic of the deployed network is a bounded disturbance of its action.
"""
