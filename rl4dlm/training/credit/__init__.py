"""What tokens are worth besides their completion's advantage: plug-ins that any trainer can take."""
