
# What is attached, and words in place of an index.
complete -c tarblk -n "__fish_seen_subcommand_from umount unmount" -f -a "(tarblk ps --names 2>/dev/null | string match -v '/dev/*')"
complete -c tarblk -n "__fish_seen_subcommand_from detach" -f -a "(tarblk ps --names 2>/dev/null | string match '/dev/*')"
complete -c tarblk -n "__fish_seen_subcommand_from stats trace logs" -f -a "(tarblk ps --names 2>/dev/null)"
complete -c tarblk -n "__fish_seen_subcommand_from image attach mount" -l index -r -F -a "auto require ignore build"
