# Print an optspec for argparse to handle cmd's options that are independent of any subcommand.
function __fish_tidegate_global_optspecs
    string join \n config= h/help V/version
end

function __fish_tidegate_needs_command
    # Figure out if the current invocation already has a command.
    set -l cmd (commandline -opc)
    set -e cmd[1]
    argparse -s (__fish_tidegate_global_optspecs) -- $cmd 2>/dev/null
    or return
    if set -q argv[1]
        # Also print the command, so this can be used to figure out what it is.
        echo $argv[1]
        return 1
    end
    return 0
end

function __fish_tidegate_using_subcommand
    set -l cmd (__fish_tidegate_needs_command)
    test -z "$cmd"
    and return 1
    contains -- $cmd[1] $argv
end

complete -c tidegate -n "__fish_tidegate_needs_command" -l config -d 'The configuration; by default ./gateway.toml, then /etc/tidegate/gateway.toml' -r -F
complete -c tidegate -n "__fish_tidegate_needs_command" -s h -l help -d 'Print help'
complete -c tidegate -n "__fish_tidegate_needs_command" -s V -l version -d 'Print version'
complete -c tidegate -n "__fish_tidegate_needs_command" -f -a "run" -d 'Start the gateway and run until SIGTERM or Ctrl-C (the default)'
complete -c tidegate -n "__fish_tidegate_needs_command" -f -a "check" -d 'Read the configuration, say everything that is wrong with it, and exit'
complete -c tidegate -n "__fish_tidegate_needs_command" -f -a "init" -d 'Write a commented gateway.toml to start from'
complete -c tidegate -n "__fish_tidegate_needs_command" -f -a "passwd" -d 'Ask for a password and print the password_hash of a [[user]]'
complete -c tidegate -n "__fish_tidegate_needs_command" -f -a "status" -d 'Say how a running gateway and each of its parts is'
complete -c tidegate -n "__fish_tidegate_needs_command" -f -a "top" -d 'Show live rates, queues and parts of a running gateway'
complete -c tidegate -n "__fish_tidegate_needs_command" -f -a "tail" -d 'Show live messages of a running gateway'
complete -c tidegate -n "__fish_tidegate_needs_command" -f -a "publish" -d 'Publish a message into a running gateway; returns when it is stored'
complete -c tidegate -n "__fish_tidegate_needs_command" -f -a "doctor" -d 'Look for what is wrong with this gateway and its surroundings, running or not, and say how to mend it'
complete -c tidegate -n "__fish_tidegate_needs_command" -f -a "completions" -d 'Print a completion script: source <(tidegate completions bash)'
complete -c tidegate -n "__fish_tidegate_needs_command" -f -a "man" -d 'Print tidegate(1), or write all man pages into a folder'
complete -c tidegate -n "__fish_tidegate_needs_command" -f -a "version" -d 'Print the version'
complete -c tidegate -n "__fish_tidegate_needs_command" -f -a "module" -d 'What the daemon runs of itself in a process of its own'
complete -c tidegate -n "__fish_tidegate_using_subcommand run" -l config -d 'The configuration; by default ./gateway.toml, then /etc/tidegate/gateway.toml' -r -F
complete -c tidegate -n "__fish_tidegate_using_subcommand run" -s h -l help -d 'Print help'
complete -c tidegate -n "__fish_tidegate_using_subcommand check" -l config -d 'The configuration; by default ./gateway.toml, then /etc/tidegate/gateway.toml' -r -F
complete -c tidegate -n "__fish_tidegate_using_subcommand check" -s h -l help -d 'Print help'
complete -c tidegate -n "__fish_tidegate_using_subcommand init" -s h -l help -d 'Print help'
complete -c tidegate -n "__fish_tidegate_using_subcommand passwd" -s h -l help -d 'Print help'
complete -c tidegate -n "__fish_tidegate_using_subcommand status" -l config -d 'The configuration; by default ./gateway.toml, then /etc/tidegate/gateway.toml' -r -F
complete -c tidegate -n "__fish_tidegate_using_subcommand status" -l json -d 'As JSON, for programs'
complete -c tidegate -n "__fish_tidegate_using_subcommand status" -s h -l help -d 'Print help'
complete -c tidegate -n "__fish_tidegate_using_subcommand top" -l config -d 'The configuration; by default ./gateway.toml, then /etc/tidegate/gateway.toml' -r -F
complete -c tidegate -n "__fish_tidegate_using_subcommand top" -l every -d 'The time between two looks' -r
complete -c tidegate -n "__fish_tidegate_using_subcommand top" -l once -d 'One table after one period, then the end'
complete -c tidegate -n "__fish_tidegate_using_subcommand top" -l json -d 'One JSON object a line, for programs'
complete -c tidegate -n "__fish_tidegate_using_subcommand top" -s h -l help -d 'Print help'
complete -c tidegate -n "__fish_tidegate_using_subcommand tail" -l config -d 'The configuration; by default ./gateway.toml, then /etc/tidegate/gateway.toml' -r -F
complete -c tidegate -n "__fish_tidegate_using_subcommand tail" -s n -l count -d 'End after so many messages' -r
complete -c tidegate -n "__fish_tidegate_using_subcommand tail" -s v -l verbose -d 'Also QoS, source and properties'
complete -c tidegate -n "__fish_tidegate_using_subcommand tail" -l json -d 'One JSON object a line, for programs'
complete -c tidegate -n "__fish_tidegate_using_subcommand tail" -s h -l help -d 'Print help'
complete -c tidegate -n "__fish_tidegate_using_subcommand publish" -l config -d 'The configuration; by default ./gateway.toml, then /etc/tidegate/gateway.toml' -r -F
complete -c tidegate -n "__fish_tidegate_using_subcommand publish" -s f -l file -d 'The payload from a file, as it is' -r -F
complete -c tidegate -n "__fish_tidegate_using_subcommand publish" -s q -l qos -r
complete -c tidegate -n "__fish_tidegate_using_subcommand publish" -l expiry -d 'Worthless after this time: "60s", "2h"' -r
complete -c tidegate -n "__fish_tidegate_using_subcommand publish" -s u -l user-property -d 'A user property; may be given several times' -r
complete -c tidegate -n "__fish_tidegate_using_subcommand publish" -l response-topic -d 'Where an answer is to go' -r
complete -c tidegate -n "__fish_tidegate_using_subcommand publish" -l correlation -d 'Correlation data of the answer' -r
complete -c tidegate -n "__fish_tidegate_using_subcommand publish" -l content-type -r
complete -c tidegate -n "__fish_tidegate_using_subcommand publish" -s r -l retain -d 'Keep it as the topic\'s retained message; an empty payload removes that'
complete -c tidegate -n "__fish_tidegate_using_subcommand publish" -l json -d 'Who gets it, as JSON'
complete -c tidegate -n "__fish_tidegate_using_subcommand publish" -s h -l help -d 'Print help'
complete -c tidegate -n "__fish_tidegate_using_subcommand doctor" -l config -d 'The configuration; by default ./gateway.toml, then /etc/tidegate/gateway.toml' -r -F
complete -c tidegate -n "__fish_tidegate_using_subcommand doctor" -l json -d 'As JSON, for programs'
complete -c tidegate -n "__fish_tidegate_using_subcommand doctor" -l offline -d 'Leave out what reaches other machines'
complete -c tidegate -n "__fish_tidegate_using_subcommand doctor" -s h -l help -d 'Print help'
complete -c tidegate -n "__fish_tidegate_using_subcommand completions" -s h -l help -d 'Print help'
complete -c tidegate -n "__fish_tidegate_using_subcommand man" -s h -l help -d 'Print help'
complete -c tidegate -n "__fish_tidegate_using_subcommand version" -s h -l help -d 'Print help'
complete -c tidegate -n "__fish_tidegate_using_subcommand module; and not __fish_seen_subcommand_from compile bench" -s h -l help -d 'Print help'
complete -c tidegate -n "__fish_tidegate_using_subcommand module; and not __fish_seen_subcommand_from compile bench" -f -a "compile" -d 'Compile a module to machine code'
complete -c tidegate -n "__fish_tidegate_using_subcommand module; and not __fish_seen_subcommand_from compile bench" -f -a "bench" -d 'Print what a call into a module costs, in nanoseconds a message'
complete -c tidegate -n "__fish_tidegate_using_subcommand module; and __fish_seen_subcommand_from compile" -s h -l help -d 'Print help'
complete -c tidegate -n "__fish_tidegate_using_subcommand module; and __fish_seen_subcommand_from bench" -s h -l help -d 'Print help'
