
# What is attached, and words in place of an index: behind what the definitions give.
_tarblk_and_names() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD - 1]} word command= names=
    _tarblk "$@"
    if [[ $prev == --index ]]; then
        COMPREPLY+=($(compgen -W 'auto require ignore build' -- "$cur"))
        return 0
    fi
    for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
        if [[ $word != -* ]]; then
            command=$word
            break
        fi
    done
    [[ $cur != -* && $prev != -n && $prev != --lines ]] || return 0
    case $command in
        umount | unmount) names=$(tarblk ps --names 2>/dev/null | grep -v '^/dev/') ;;
        detach) names=$(tarblk ps --names 2>/dev/null | grep '^/dev/') ;;
        stats | trace | logs) names=$(tarblk ps --names 2>/dev/null) ;;
    esac
    if [[ -n $names ]]; then
        local IFS=$'\n'
        COMPREPLY=($(compgen -W "$names" -- "$cur"))
    fi
}
complete -F _tarblk_and_names -o bashdefault -o default tarblk
