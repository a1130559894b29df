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

complete -c tidegate -n "__fish_tidegate_needs_command" -l config -d 'Instead of ./gateway.toml or /etc/tidegate/gateway.toml' -r -F
complete -c tidegate -n "__fish_tidegate_needs_command" -s h -l help -d 'Print help'
complete -c tidegate -n "__fish_tidegate_needs_command" -s V -l version -d 'Print version'
complete -c tidegate -n "__fish_tidegate_needs_command" -f -a "run" -d 'Start the gateway and run until SIGTERM or Ctrl-C (the default)'
complete -c tidegate -n "__fish_tidegate_needs_command" -f -a "check" -d 'Say everything that is wrong with the configuration'
complete -c tidegate -n "__fish_tidegate_needs_command" -f -a "init" -d 'Write a commented gateway.toml to start from'
complete -c tidegate -n "__fish_tidegate_needs_command" -f -a "passwd" -d 'Ask for a password and print the password_hash of a [[user]]'
complete -c tidegate -n "__fish_tidegate_needs_command" -f -a "status" -d 'Say how a running gateway and each of its parts is'
complete -c tidegate -n "__fish_tidegate_needs_command" -f -a "top" -d 'Show live rates, queues and parts'
complete -c tidegate -n "__fish_tidegate_needs_command" -f -a "tail" -d 'Show live messages'
complete -c tidegate -n "__fish_tidegate_needs_command" -f -a "publish" -d 'Publish a message; returns when it is stored'
complete -c tidegate -n "__fish_tidegate_needs_command" -f -a "doctor" -d 'Look for what is wrong here, and say how to mend it'
complete -c tidegate -n "__fish_tidegate_needs_command" -f -a "completions" -d 'Print a completion script: source <(tidegate completions bash)'
complete -c tidegate -n "__fish_tidegate_needs_command" -f -a "man" -d 'Print tidegate(1), or write all man pages into a folder'
complete -c tidegate -n "__fish_tidegate_needs_command" -f -a "client" -d 'List, look at and disconnect MQTT clients'
complete -c tidegate -n "__fish_tidegate_needs_command" -f -a "topic" -d 'List and remove retained messages'
complete -c tidegate -n "__fish_tidegate_needs_command" -f -a "asset" -d 'Name, read, write and watch the assets of the connectors'
complete -c tidegate -n "__fish_tidegate_needs_command" -f -a "reload" -d 'Have the running gateway read its configuration again'
complete -c tidegate -n "__fish_tidegate_needs_command" -f -a "discover" -d 'Find what is connected, and print ready configuration'
complete -c tidegate -n "__fish_tidegate_needs_command" -f -a "version" -d 'Print the version'
complete -c tidegate -n "__fish_tidegate_needs_command" -f -a "module" -d 'Work with modules'
complete -c tidegate -n "__fish_tidegate_using_subcommand run" -l config -d 'Instead of ./gateway.toml or /etc/tidegate/gateway.toml' -r -F
complete -c tidegate -n "__fish_tidegate_using_subcommand run" -s h -l help -d 'Print help'
complete -c tidegate -n "__fish_tidegate_using_subcommand check" -l config -d 'Instead of ./gateway.toml or /etc/tidegate/gateway.toml' -r -F
complete -c tidegate -n "__fish_tidegate_using_subcommand check" -s h -l help -d 'Print help'
complete -c tidegate -n "__fish_tidegate_using_subcommand init" -s h -l help -d 'Print help'
complete -c tidegate -n "__fish_tidegate_using_subcommand passwd" -s h -l help -d 'Print help'
complete -c tidegate -n "__fish_tidegate_using_subcommand status" -l config -d 'Instead of ./gateway.toml or /etc/tidegate/gateway.toml' -r -F
complete -c tidegate -n "__fish_tidegate_using_subcommand status" -l json -d 'As JSON, for programs'
complete -c tidegate -n "__fish_tidegate_using_subcommand status" -s h -l help -d 'Print help'
complete -c tidegate -n "__fish_tidegate_using_subcommand top" -l config -d 'Instead of ./gateway.toml or /etc/tidegate/gateway.toml' -r -F
complete -c tidegate -n "__fish_tidegate_using_subcommand top" -l every -d 'The time between two looks' -r
complete -c tidegate -n "__fish_tidegate_using_subcommand top" -l once -d 'One table after one period, then the end'
complete -c tidegate -n "__fish_tidegate_using_subcommand top" -l json -d 'One JSON object a line, for programs'
complete -c tidegate -n "__fish_tidegate_using_subcommand top" -s h -l help -d 'Print help'
complete -c tidegate -n "__fish_tidegate_using_subcommand tail" -l config -d 'Instead of ./gateway.toml or /etc/tidegate/gateway.toml' -r -F
complete -c tidegate -n "__fish_tidegate_using_subcommand tail" -s n -l count -d 'End after so many messages' -r
complete -c tidegate -n "__fish_tidegate_using_subcommand tail" -s v -l verbose -d 'Also QoS, source and properties'
complete -c tidegate -n "__fish_tidegate_using_subcommand tail" -l json -d 'One JSON object a line, for programs'
complete -c tidegate -n "__fish_tidegate_using_subcommand tail" -s h -l help -d 'Print help'
complete -c tidegate -n "__fish_tidegate_using_subcommand publish" -l config -d 'Instead of ./gateway.toml or /etc/tidegate/gateway.toml' -r -F
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
complete -c tidegate -n "__fish_tidegate_using_subcommand doctor" -l config -d 'Instead of ./gateway.toml or /etc/tidegate/gateway.toml' -r -F
complete -c tidegate -n "__fish_tidegate_using_subcommand doctor" -l json -d 'As JSON, for programs'
complete -c tidegate -n "__fish_tidegate_using_subcommand doctor" -l offline -d 'Leave out what reaches other machines'
complete -c tidegate -n "__fish_tidegate_using_subcommand doctor" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c tidegate -n "__fish_tidegate_using_subcommand completions" -s h -l help -d 'Print help'
complete -c tidegate -n "__fish_tidegate_using_subcommand man" -s h -l help -d 'Print help'
complete -c tidegate -n "__fish_tidegate_using_subcommand client; and not __fish_seen_subcommand_from list show kick" -s h -l help -d 'Print help'
complete -c tidegate -n "__fish_tidegate_using_subcommand client; and not __fish_seen_subcommand_from list show kick" -f -a "list" -d 'Name the clients that are connected or have a session'
complete -c tidegate -n "__fish_tidegate_using_subcommand client; and not __fish_seen_subcommand_from list show kick" -f -a "show" -d 'Say everything about one client: connection, session, subscriptions, limits'
complete -c tidegate -n "__fish_tidegate_using_subcommand client; and not __fish_seen_subcommand_from list show kick" -f -a "kick" -d 'End a client\'s connection; it may connect again'
complete -c tidegate -n "__fish_tidegate_using_subcommand client; and __fish_seen_subcommand_from list" -l user -d 'Only those of this user' -r
complete -c tidegate -n "__fish_tidegate_using_subcommand client; and __fish_seen_subcommand_from list" -l config -d 'Instead of ./gateway.toml or /etc/tidegate/gateway.toml' -r -F
complete -c tidegate -n "__fish_tidegate_using_subcommand client; and __fish_seen_subcommand_from list" -l connected -d 'Only those that are connected'
complete -c tidegate -n "__fish_tidegate_using_subcommand client; and __fish_seen_subcommand_from list" -l json -d 'As JSON, for programs'
complete -c tidegate -n "__fish_tidegate_using_subcommand client; and __fish_seen_subcommand_from list" -s h -l help -d 'Print help'
complete -c tidegate -n "__fish_tidegate_using_subcommand client; and __fish_seen_subcommand_from show" -l config -d 'Instead of ./gateway.toml or /etc/tidegate/gateway.toml' -r -F
complete -c tidegate -n "__fish_tidegate_using_subcommand client; and __fish_seen_subcommand_from show" -l json -d 'As JSON, for programs'
complete -c tidegate -n "__fish_tidegate_using_subcommand client; and __fish_seen_subcommand_from show" -s h -l help -d 'Print help'
complete -c tidegate -n "__fish_tidegate_using_subcommand client; and __fish_seen_subcommand_from kick" -l config -d 'Instead of ./gateway.toml or /etc/tidegate/gateway.toml' -r -F
complete -c tidegate -n "__fish_tidegate_using_subcommand client; and __fish_seen_subcommand_from kick" -l end-session -d 'Also end its session, with its subscriptions and what waits for it'
complete -c tidegate -n "__fish_tidegate_using_subcommand client; and __fish_seen_subcommand_from kick" -l json -d 'As JSON, for programs'
complete -c tidegate -n "__fish_tidegate_using_subcommand client; and __fish_seen_subcommand_from kick" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c tidegate -n "__fish_tidegate_using_subcommand topic; and not __fish_seen_subcommand_from list clear" -s h -l help -d 'Print help'
complete -c tidegate -n "__fish_tidegate_using_subcommand topic; and not __fish_seen_subcommand_from list clear" -f -a "list" -d 'Name the topics with a retained message: its time, its size, the topic'
complete -c tidegate -n "__fish_tidegate_using_subcommand topic; and not __fish_seen_subcommand_from list clear" -f -a "clear" -d 'Remove the retained messages of topics'
complete -c tidegate -n "__fish_tidegate_using_subcommand topic; and __fish_seen_subcommand_from list" -l config -d 'Instead of ./gateway.toml or /etc/tidegate/gateway.toml' -r -F
complete -c tidegate -n "__fish_tidegate_using_subcommand topic; and __fish_seen_subcommand_from list" -l json -d 'With the payload and all else, one JSON object a line, for programs'
complete -c tidegate -n "__fish_tidegate_using_subcommand topic; and __fish_seen_subcommand_from list" -s h -l help -d 'Print help'
complete -c tidegate -n "__fish_tidegate_using_subcommand topic; and __fish_seen_subcommand_from clear" -l config -d 'Instead of ./gateway.toml or /etc/tidegate/gateway.toml' -r -F
complete -c tidegate -n "__fish_tidegate_using_subcommand topic; and __fish_seen_subcommand_from clear" -l json -d 'As JSON, for programs'
complete -c tidegate -n "__fish_tidegate_using_subcommand topic; and __fish_seen_subcommand_from clear" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c tidegate -n "__fish_tidegate_using_subcommand asset; and not __fish_seen_subcommand_from list read write watch" -s h -l help -d 'Print help'
complete -c tidegate -n "__fish_tidegate_using_subcommand asset; and not __fish_seen_subcommand_from list read write watch" -f -a "list" -d 'Name the assets of the configuration, or the points of one of them'
complete -c tidegate -n "__fish_tidegate_using_subcommand asset; and not __fish_seen_subcommand_from list read write watch" -f -a "read" -d 'Read points of an asset now, from the machine'
complete -c tidegate -n "__fish_tidegate_using_subcommand asset; and not __fish_seen_subcommand_from list read write watch" -f -a "write" -d 'Write points of an asset: setpoint=60.5 valve=true'
complete -c tidegate -n "__fish_tidegate_using_subcommand asset; and not __fish_seen_subcommand_from list read write watch" -f -a "watch" -d 'Show values as they come, until Ctrl-C'
complete -c tidegate -n "__fish_tidegate_using_subcommand asset; and __fish_seen_subcommand_from list" -l config -d 'Instead of ./gateway.toml or /etc/tidegate/gateway.toml' -r -F
complete -c tidegate -n "__fish_tidegate_using_subcommand asset; and __fish_seen_subcommand_from list" -l json -d 'As JSON, for programs'
complete -c tidegate -n "__fish_tidegate_using_subcommand asset; and __fish_seen_subcommand_from list" -s h -l help -d 'Print help'
complete -c tidegate -n "__fish_tidegate_using_subcommand asset; and __fish_seen_subcommand_from read" -l config -d 'Instead of ./gateway.toml or /etc/tidegate/gateway.toml' -r -F
complete -c tidegate -n "__fish_tidegate_using_subcommand asset; and __fish_seen_subcommand_from read" -l timeout -d 'How long to wait for the answer' -r
complete -c tidegate -n "__fish_tidegate_using_subcommand asset; and __fish_seen_subcommand_from read" -l json -d 'As JSON, for programs'
complete -c tidegate -n "__fish_tidegate_using_subcommand asset; and __fish_seen_subcommand_from read" -s h -l help -d 'Print help'
complete -c tidegate -n "__fish_tidegate_using_subcommand asset; and __fish_seen_subcommand_from write" -l config -d 'Instead of ./gateway.toml or /etc/tidegate/gateway.toml' -r -F
complete -c tidegate -n "__fish_tidegate_using_subcommand asset; and __fish_seen_subcommand_from write" -l timeout -d 'How long to wait for the answer' -r
complete -c tidegate -n "__fish_tidegate_using_subcommand asset; and __fish_seen_subcommand_from write" -l json -d 'As JSON, for programs'
complete -c tidegate -n "__fish_tidegate_using_subcommand asset; and __fish_seen_subcommand_from write" -s h -l help -d 'Print help'
complete -c tidegate -n "__fish_tidegate_using_subcommand asset; and __fish_seen_subcommand_from watch" -l config -d 'Instead of ./gateway.toml or /etc/tidegate/gateway.toml' -r -F
complete -c tidegate -n "__fish_tidegate_using_subcommand asset; and __fish_seen_subcommand_from watch" -l json -d 'As JSON, for programs'
complete -c tidegate -n "__fish_tidegate_using_subcommand asset; and __fish_seen_subcommand_from watch" -s h -l help -d 'Print help'
complete -c tidegate -n "__fish_tidegate_using_subcommand reload" -l config -d 'Instead of ./gateway.toml or /etc/tidegate/gateway.toml' -r -F
complete -c tidegate -n "__fish_tidegate_using_subcommand reload" -l check -d 'Say what would change, and change nothing'
complete -c tidegate -n "__fish_tidegate_using_subcommand reload" -l no-revert -d 'Do not go back to what ran before where a listener or an uplink does not come up'
complete -c tidegate -n "__fish_tidegate_using_subcommand reload" -l json -d 'As JSON, for programs'
complete -c tidegate -n "__fish_tidegate_using_subcommand reload" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c tidegate -n "__fish_tidegate_using_subcommand discover; and not __fish_seen_subcommand_from i2c serial modbus" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c tidegate -n "__fish_tidegate_using_subcommand discover; and not __fish_seen_subcommand_from i2c serial modbus" -f -a "i2c" -d 'List the I²C buses of this host; with --bus probe the addresses of one'
complete -c tidegate -n "__fish_tidegate_using_subcommand discover; and not __fish_seen_subcommand_from i2c serial modbus" -f -a "serial" -d 'List the serial ports of this host; none is opened'
complete -c tidegate -n "__fish_tidegate_using_subcommand discover; and not __fish_seen_subcommand_from i2c serial modbus" -f -a "modbus" -d 'Ask units of one Modbus line whether they are there; say which line'
complete -c tidegate -n "__fish_tidegate_using_subcommand discover; and __fish_seen_subcommand_from i2c" -l bus -d 'Probe every address of this bus (N or /dev/i2c-N), which can disturb a device on it' -r
complete -c tidegate -n "__fish_tidegate_using_subcommand discover; and __fish_seen_subcommand_from i2c" -s h -l help -d 'Print help'
complete -c tidegate -n "__fish_tidegate_using_subcommand discover; and __fish_seen_subcommand_from serial" -s h -l help -d 'Print help'
complete -c tidegate -n "__fish_tidegate_using_subcommand discover; and __fish_seen_subcommand_from modbus" -l config -d 'Instead of ./gateway.toml or /etc/tidegate/gateway.toml' -r -F
complete -c tidegate -n "__fish_tidegate_using_subcommand discover; and __fish_seen_subcommand_from modbus" -l connector -d 'The line of this [[connector]] of the configuration (stop the gateway first where it is a serial one)' -r
complete -c tidegate -n "__fish_tidegate_using_subcommand discover; and __fish_seen_subcommand_from modbus" -l tcp -d 'A Modbus TCP device or gateway, HOST:PORT' -r
complete -c tidegate -n "__fish_tidegate_using_subcommand discover; and __fish_seen_subcommand_from modbus" -l rtu-tcp -d 'A serial line behind TCP (RTU frames), HOST:PORT' -r
complete -c tidegate -n "__fish_tidegate_using_subcommand discover; and __fish_seen_subcommand_from modbus" -l device -d 'A serial port' -r -F
complete -c tidegate -n "__fish_tidegate_using_subcommand discover; and __fish_seen_subcommand_from modbus" -l baud -r
complete -c tidegate -n "__fish_tidegate_using_subcommand discover; and __fish_seen_subcommand_from modbus" -l parity -r -f -a "none\t''
even\t''
odd\t''"
complete -c tidegate -n "__fish_tidegate_using_subcommand discover; and __fish_seen_subcommand_from modbus" -l stop-bits -r
complete -c tidegate -n "__fish_tidegate_using_subcommand discover; and __fish_seen_subcommand_from modbus" -l units -d 'Which units: 1-247, or 1,3,10-20' -r
complete -c tidegate -n "__fish_tidegate_using_subcommand discover; and __fish_seen_subcommand_from modbus" -l timeout -d 'How long to wait for each; a serial line of 247 units needs four minutes at 1s' -r
complete -c tidegate -n "__fish_tidegate_using_subcommand discover; and __fish_seen_subcommand_from modbus" -s h -l help -d 'Print help'
complete -c tidegate -n "__fish_tidegate_using_subcommand version" -s h -l help -d 'Print help'
complete -c tidegate -n "__fish_tidegate_using_subcommand module; and not __fish_seen_subcommand_from precompile compile bench" -s h -l help -d 'Print help'
complete -c tidegate -n "__fish_tidegate_using_subcommand module; and not __fish_seen_subcommand_from precompile compile bench" -f -a "precompile" -d 'Compile modules for a machine that cannot: 32-bit ARM'
complete -c tidegate -n "__fish_tidegate_using_subcommand module; and not __fish_seen_subcommand_from precompile compile bench" -f -a "compile" -d 'Compile a module to machine code; what the daemon runs of itself in a process of its own'
complete -c tidegate -n "__fish_tidegate_using_subcommand module; and not __fish_seen_subcommand_from precompile compile bench" -f -a "bench" -d 'Print what a call into a module costs, in nanoseconds a message'
complete -c tidegate -n "__fish_tidegate_using_subcommand module; and __fish_seen_subcommand_from precompile" -l target -d 'What the machine runs' -r -f -a "pulley32\t''"
complete -c tidegate -n "__fish_tidegate_using_subcommand module; and __fish_seen_subcommand_from precompile" -l out -d 'Where to write NAME-….pulley32 (on the machine: /usr/local/lib/tidegate/precompiled, owned by root)' -r -F
complete -c tidegate -n "__fish_tidegate_using_subcommand module; and __fish_seen_subcommand_from precompile" -s h -l help -d 'Print help'
complete -c tidegate -n "__fish_tidegate_using_subcommand module; and __fish_seen_subcommand_from compile" -s h -l help -d 'Print help'
complete -c tidegate -n "__fish_tidegate_using_subcommand module; and __fish_seen_subcommand_from bench" -s h -l help -d 'Print help'
