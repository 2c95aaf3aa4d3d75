"""What must hold in an object that its shape can't say? One module for the kinds that belong together.

Each check raises problems.Refused, with the field and the reason, as Istio's webhook would refuse it.
"""
