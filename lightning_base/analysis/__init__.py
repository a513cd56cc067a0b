"""What the experts of a finished run have learnt: from its checkpoints to tables, figures and a page."""
