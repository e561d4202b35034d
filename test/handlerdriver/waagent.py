"""Runs an extension package with the extension code of the real Azure Linux
agent (Debian package waagent), outside Azure: its own goal state processing,
with an object in the place of the wire server.

Arguments: PACKAGE.zip HANDLER VERSION SETTINGS.json WAAGENT.conf
Standard input: one word a line, each answered with one line of JSON:
  goal     process the goal state (install or update, write settings, run enable)
  settings FILE   the next goal state has these settings
  version V FILE  the next goal state has this version of the handler
  status   what the agent would report about the extension
  remove   the goal state no longer has the extension
Must run in a mount namespace of its own: it writes /var/lib/waagent and /var/log.
"""

import json
import shutil
import sys

from azurelinuxagent.common import conf, logger
from azurelinuxagent.common.protocol.restapi import (Extension, ExtensionRequestedState, ExtensionSettings, ExtensionState,
                                                     ExtHandlerPackage, VMStatus)
from azurelinuxagent.ga.exthandlers import ExtHandlerInstance, get_exthandlers_handler


class GoalState:
    incarnation = "1"


class ExtensionsGoalState:
    activity_id = correlation_id = created_on_timestamp = "1"
    on_hold = False
    required_features = []
    extensions = []


class Client:
    def __init__(self, goal):
        self.goal = goal

    def get_goal_state(self):
        return GoalState

    def get_extensions_goal_state(self):
        return self.goal


class Package:
    def __init__(self, versions):
        self.versions = versions


class Protocol:
    """What the agent's extension code asks of the wire server."""

    def __init__(self):
        self.packages = {}
        self.goal = ExtensionsGoalState()
        self.client = Client(self.goal)

    def get_extensions_goal_state(self):
        return self.goal

    def get_ext_handler_pkgs(self, handler):
        result = Package([])
        for version, path in self.packages.items():
            package = ExtHandlerPackage(version)
            package.uris = ["file://" + path]
            result.versions.append(package)
        return result

    def download_ext_handler_pkg(self, uri, destination, headers=None, use_proxy=True):
        shutil.copy(uri[len("file://"):], destination)
        return True

    def get_endpoint(self):
        return "168.63.129.16"

    def get_incarnation(self):
        return GoalState.incarnation


class Machine:
    def __init__(self, package, name, version, settings):
        self.name = name
        self.protocol = Protocol()
        self.handler = get_exthandlers_handler(self.protocol)
        self.sequence = 0
        self.version = version
        self.add_package(version, package)
        self.set_settings(settings)

    def add_package(self, version, path):
        self.version = version
        self.protocol.packages[version] = path

    def set_settings(self, path):
        self.sequence += 1
        with open(path) as f:
            public = json.load(f)
        self.goal(ExtensionRequestedState.Enabled, public)

    def goal(self, state, public):
        extension = Extension(name=self.name)
        extension.version = self.version
        extension.state = state
        extension.manifest_uris = ["unused"]
        if public is not None:
            extension.settings.append(ExtensionSettings(name=self.name, sequenceNumber=self.sequence, publicSettings=public,
                                                        protectedSettings=None, certificateThumbprint=None, dependencyLevel=0,
                                                        state=ExtensionState.Enabled))
        self.protocol.goal.extensions = [extension]
        GoalState.incarnation = str(int(GoalState.incarnation) + 1)

    def process(self):
        self.handler.run()
        return self.status()

    def status(self):
        extension = self.protocol.goal.extensions[0]
        instance = ExtHandlerInstance(extension, self.protocol)
        out = {"handlerState": instance.get_handler_state()}
        handler_status = instance.get_handler_status()
        if handler_status is not None:
            out.update(handlerStatus=handler_status.status, handlerCode=handler_status.code, handlerMessage=str(handler_status.message))
        if extension.settings:
            status = instance.collect_ext_status(extension.settings[0])
            if status is not None:
                out.update(status=status.status, code=status.code, message=str(status.message), operation=status.operation,
                           substatus=len(status.substatusList))
        return out


def main():
    package, name, version, settings, configuration = sys.argv[1:6]
    conf.load_conf_from_file(configuration)
    logger.add_logger_appender(logger.AppenderType.FILE, logger.LogLevel.VERBOSE, path="/var/log/waagent.log")
    machine = Machine(package, name, version, settings)
    for line in sys.stdin:
        words = line.split()
        if words[0] == "goal":
            answer = machine.process()
        elif words[0] == "status":
            answer = machine.status()
        elif words[0] == "settings":
            machine.set_settings(words[1])
            answer = {}
        elif words[0] == "version":
            machine.add_package(words[1], package)
            machine.set_settings(words[2])
            answer = {}
        elif words[0] == "remove":
            machine.goal(ExtensionRequestedState.Uninstall, None)
            answer = machine.process()
        else:
            answer = {"error": "unknown word " + words[0]}
        print(json.dumps(answer), flush=True)


main()
