"""Who is where: ranks, groups, schedules' ticks, machines."""
