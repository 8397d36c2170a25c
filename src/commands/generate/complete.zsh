# What is attached, and words in place of an index.
_tarblk_names() {
    local -a names
    names=(${(f)"$(tarblk ps --names 2>/dev/null)"})
    (( $#names )) && compadd -a names
}
_tarblk_mounts() {
    local -a names
    names=(${${(f)"$(tarblk ps --names 2>/dev/null)"}:#/dev/*})
    (( $#names )) && compadd -a names || _files -/
}
_tarblk_index() {
    compadd auto require ignore build
    _files
}

