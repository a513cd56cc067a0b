"""The claims of the BASE paper (Lewis et al. 2021), each with a rule, numbers and a verdict."""
