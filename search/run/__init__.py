"""`run`: open the study, complete its budget, finale, summary."""
