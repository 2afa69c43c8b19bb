"""Whatever images people have, prepared once as sets that training reads."""
